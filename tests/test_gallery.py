import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jmae import gallery
from jmae.errors import InputError, exit_code


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two smooth images, a constant one and a volume."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b"):
        noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (40, 36)), 3)
        Image.fromarray((40 + 200 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    Image.fromarray(np.full((40, 36, 3), 90, np.uint8)).save(folder / "flat.png")
    volume = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (24, 20, 18)), 2).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "v.nii.gz")
    return folder


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.long
def test_every_generator_has_a_row_with_its_draws(files, tmp_path, monkeypatch):
    figures, save = [], gallery.save
    monkeypatch.setattr(gallery, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    out = tmp_path / "new" / "g.png"
    arguments = [str(files / "a.png"), "--out", str(out), "--size=32,32", "--draws", "1"]
    assert exit_code(gallery.main, arguments) == 0
    with Image.open(out) as written:
        assert written.format == "PNG"
    assert list(out.parent.iterdir()) == [out]
    rows = np.array(titles(figures[0])).reshape(len(gallery.ENTRIES), 3)
    names = [row.title for row in gallery.ENTRIES]
    assert [title.split("\n")[0] for title in rows[:, 1]] == names
    assert set(rows[:, 0]) == {"a.png"}
    unchanged = ["nothing changed" in title for title in rows[:, 1]]
    assert unchanged[0] and sum(unchanged) < 4  # FPI mixes two images: of one it changes nothing


def test_the_source_is_the_next_image_or_the_image_itself():
    image = np.tile(np.linspace(0, 1, 32, dtype=np.float32)[:, None, None], (1, 32, 1))
    other = image.transpose(1, 0, 2)
    fpi = gallery.entries_of("fpi")
    alone = titles(gallery.picture([image], ["a"], fpi, seed=0, draws=1))
    assert alone[1] == "FPI\nnothing changed" and alone[2] == "target, maximum 0"
    figure = gallery.picture([image, other], ["a", "b"], fpi, seed=0, draws=1)
    arrays = [axes.images[0].get_array() for axes in figure.axes]
    for clean, mixed, target, source in ((*arrays[:3], other), (*arrays[3:], image)):
        np.testing.assert_allclose(mixed, clean + target * (source[..., 0] - clean), atol=1e-3)
        assert target.max() > 0.05
    assert figure.axes[1].collections and not figure.axes[2].collections  # the outline lies on the image


def test_a_seed_gives_the_same_picture_and_another_a_different_one(files):
    image, keys = gallery.read_shown(str(files / "a.png"), (32, 32)), [0, 0, 1]
    cutpaste = gallery.entries_of("cutpaste")
    arrays = [
        gallery.picture([image], ["a"], cutpaste, seed=seed, draws=1).axes[1].images[0].get_array() for seed in keys
    ]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert (arrays[0] != arrays[2]).any()
    subset = gallery.picture(
        [image], ["a"], gallery.entries_of("nsa,cutpaste"), seed=0, draws=1
    )  # nor do other rows matter
    np.testing.assert_array_equal(subset.axes[1].images[0].get_array(), arrays[0])


def test_a_volume_shows_the_slice_of_its_largest_target(files, tmp_path):
    clean, out, target = (np.zeros((4, 5, 6, c)) for c in (1, 1, 0))
    target = np.zeros((4, 5, 6))
    target[1:3, 1:3, 4] = 1
    out[1, 1, 4] = 0.5
    shown = gallery.panel(clean, out, target)
    assert shown.slice == 4 and shown.image.max() == 0.5 and shown.target.sum() == 4 and shown.changed
    assert gallery.panel(clean, clean, 0 * target).slice == 3
    path = tmp_path / "v.png"
    assert exit_code(gallery.main, [str(files / "v.nii.gz"), f"--out={path}", "--only=pii", "--draws=1"]) == 0
    assert path.stat().st_size > 1000
    image = gallery.read_shown(str(files / "v.nii.gz"), None)
    assert image.shape == (24, 20, 18, 1) and image.min() == 0 and image.max() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out=g.png", "name 1 to 20 images"),
        ("a.png", "name 1 to 20 images"),
        ("a.png --out=g.jpg", "ends in .png"),
        ("a.png --out=a.png", "this would replace the image"),
        ("missing.png --out=g.png", "missing.png"),
        ("a.png --out=g.png --only=nas", "did you mean nsa?"),
        ("a.png --out=g.png --draws=0", "write 1 to 20"),
        ("a.png --out=g.png --seed=x", "not a whole number"),
        ("a.png --out=g.png --size=32", "numbers: write 2"),
        ("a.png --out=g.png --size=4,4", "16 or more"),
        ("a.png v.nii.gz --out=g.png", "differ in size"),
        ("a.png --out=g.png --sizes=32,32", "did you mean --size?"),
    ],
)
def test_what_is_wrong_is_one_line(files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files)
    assert exit_code(gallery.main, arguments.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (files / "g.png").exists()


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_nothing(files):
    with pytest.raises(InputError, match=r"g\.png: cannot be written"):
        gallery.save(gallery.Figure(), files / "a.png" / "g.png")
    assert not list(files.glob(".*"))


def test_colours_become_grey_and_other_channels_the_first(files, tmp_path):
    assert gallery.read_shown(str(files / "flat.png"), (20, 24)).shape == (20, 24, 1)
    np.save(tmp_path / "two.npy", np.stack([np.eye(20), np.ones((20, 20))], -1).astype(np.float32))
    np.testing.assert_array_equal(gallery.read_shown(str(tmp_path / "two.npy"), (20, 20))[..., 0], np.eye(20))
    with pytest.raises(InputError, match="16 or more"):
        gallery.read_shown(str(files / "a.png"), (8, 32))
