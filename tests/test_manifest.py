"""The manifest: each rule by the smallest file that breaks it."""

import csv
import os

import numpy as np
import pytest
from PIL import Image as pillow

from jmae.data.files import Image, write_map
from jmae.data.manifest import COLUMNS, Finding, Row, held_out, parse_manifest, read_cases, summary
from jmae.data.opening import lines_of, open_each
from jmae.errors import InputError
from jmae.seen import SeenRows

HEAD = ",".join(COLUMNS)
GOOD = [
    "n1,P1,train,0,n1.png,,",
    "n2,P2,train,0,n2.png,,",
    "v1,P3,val,0,v1.png,,",
    "t1,P4,test,0,t1.png,,r.png",
    "t2,P5,test,1,a.png;b.png,m.png,r.png",
]


def manifest(tmp_path, *rows, head=HEAD, end="\n", name="manifest.csv"):
    path = tmp_path / name
    path.write_bytes(end.join([head, *rows, ""]).encode())
    return path


def rows_of(path, **options):
    """The rows of a manifest; all of its problems are raised."""
    rows, _, lines = parse_manifest(path, **options)
    if lines:
        raise InputError("\n".join(lines))
    return rows


def problems(path, **options):
    """All lines of the refusal, each without the path that it starts with."""
    with pytest.raises(InputError) as caught:
        rows_of(path, **options)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_a_row_has_absolute_paths_labels_boxes_and_its_further_columns(tmp_path):
    head = f"{HEAD},boxes,age"
    path = manifest(tmp_path, "t,P,test,1,a.png;sub/b c.png,../m.png,/far/r.png,1 2 3.5 4;0 0 9 9,63", head=head)
    assert rows_of(path) == [
        Row(
            id="t",
            patient="P",
            split="test",
            label=1,
            image=(f"{tmp_path}/a.png", f"{tmp_path}/sub/b c.png"),
            mask=str(tmp_path.parent / "m.png"),
            region="/far/r.png",
            boxes=((1.0, 2.0, 3.5, 4.0), (0.0, 0.0, 9.0, 9.0)),
            extra={"age": "63"},
        )
    ]


def test_a_relative_manifest_path_gives_absolute_image_paths(tmp_path, monkeypatch):
    manifest(tmp_path, *GOOD)
    monkeypatch.chdir(tmp_path)
    assert rows_of("manifest.csv")[0].image == (f"{tmp_path}/n1.png",)


@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n"), ("", "\r")])
def test_bom_and_line_ends_do_not_matter(tmp_path, start, end):
    rows = rows_of(manifest(tmp_path, *GOOD, "", "  ,,,,,,", head=start + HEAD, end=end))
    assert [row.id for row in rows] == ["n1", "n2", "v1", "t1", "t2"]
    assert [row.label for row in rows] == [0, 0, 0, 0, 1]


def test_cells_may_hold_other_scripts_spaces_and_quoted_commas(tmp_path):
    row = rows_of(manifest(tmp_path, '胸部 1,Пётр,train,0,"a, b é.png",,', name="список 1.csv"))[0]
    assert row.id == "胸部 1" and row.patient == "Пётр" and row.image == (f"{tmp_path}/a, b é.png",)


def test_an_empty_label_is_unknown_not_normal(tmp_path):
    assert rows_of(manifest(tmp_path, "a,P,test,,a.png,,"))[0].label is None


FAULTS = {
    "bad label": (["a,P,train,2,a.png,,"], "line 2: label '2'"),
    "label as a decimal": (["a,P,train,0.0,a.png,,"], "label '0.0'"),
    "no id": ([",P,train,0,a.png,,"], "no id"),
    "id with a slash": (["a/b,P,train,0,a.png,,"], "cannot be a file name"),
    "id that climbs": (["..,P,train,0,a.png,,"], "cannot be a file name"),
    "id with a backslash": (["a\\b,P,train,0,a.png,,"], "cannot be a file name"),
    "id with a control character": (["a\x07b,P,train,0,a.png,,"], "cannot be a file name"),
    "id that is too long": (["é" * 101 + ",P,train,0,a.png,,"], "longer than 200 bytes"),
    "no split": (["a,P,,0,a.png,,"], "no split"),
    "no image": (["a,P,train,0,,,"], "image ''"),
    "empty channel": (["a,P,train,0,a.png;;b.png,,"], "empty channel"),
    "channel twice": (["a,P,train,0,a.png;a.png,,"], "one twice"),
    "too few cells": (["a,P,train,0,a.png"], "line 2: 5 cells for 7 columns"),
    "too many cells": (["a,P,train,0,a,b.png,,"], "line 2: 8 cells for 7 columns"),
    "patient in two splits": (["a,P,train,0,a.png,,", "b,P,test,0,b.png,,"], "patient 'P' is in train and test"),
    "patient in unlabeled": (["a,P,train,0,a.png,,", "b,P,unlabeled,,b.png,,"], "in train and unlabeled"),
    "image in two splits": (["a,P,train,0,x/../a.png,,", "b,Q,test,0,a.png,,"], "is in train and test"),
    "abnormal in train": (["a,P,train,1,a.png,,"], "'a' is abnormal and in train: move it to val, test or"),
    "abnormal in train with a mask": (["a,P,train,1,a.png,m.png,"], "move it to val, test or unlabeled"),
    "only other splits": (["a,P,Train,0,a.png,,"], "no row of train, unlabeled, val, test, only 'Train'"),
    "no rows": ([], "no row of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_with_its_place_and_remedy(tmp_path, fault):
    rows, words = FAULTS[fault]
    (line,) = problems(manifest(tmp_path, *rows))
    assert words in line and ": " in line


@pytest.mark.parametrize(
    "boxes",
    ["1 2 3", "1 2 3 4 5", "1 2 x 4", "1 2 1 4", "4 2 1 4", "1 2 nan 4", "1 2 3 4;", "1 2 3 4;1 2 3 4 5 6", "1,2,3,4"],
)
def test_boxes_that_are_none_are_refused(tmp_path, boxes):
    (line,) = problems(manifest(tmp_path, f'a,P,test,1,a.png,,,"{boxes}"', head=f"{HEAD},boxes"))
    assert f"line 2: boxes '{boxes}'" in line


def test_series_of_contrast_are_paths_and_the_midline_is_carried_along(tmp_path):
    path = manifest(
        tmp_path, "a,P,test,0,a;b,,,b,p1; p2,middle,second", "b,Q,test,0,c,,,,,,", head=f"{HEAD},pre,post,midline,half"
    )
    first, second = rows_of(path)
    assert first.pre == (f"{tmp_path}/b",) and first.post == (f"{tmp_path}/p1", f"{tmp_path}/p2")
    assert first.extra == {"midline": "middle", "half": "second"}
    assert second.pre == second.post == () and second.extra == {"midline": "", "half": ""}
    assert rows_of(manifest(tmp_path, *GOOD[:1]))[0].pre == ()


@pytest.mark.parametrize(
    "pre, post", [("a", ""), ("", "b"), ("a;b", "c"), ("a", "b;"), ("a", ";"), ("a", "b;b"), ("a", "a;b"), (";", "b")]
)
def test_series_before_and_after_contrast_come_together(tmp_path, pre, post):
    (line,) = problems(manifest(tmp_path, f"x,P,test,0,x.png,,,{pre},{post}", head=f"{HEAD},pre,post"))
    assert line.startswith(f"line 2: pre {pre!r} with post {post!r}: name one")


@pytest.mark.parametrize(
    "midline, half, word",
    [
        ("12", "", ""),
        ("12.5", "first", ""),
        ("middle", "second", ""),
        ("centre", "", "midline 'centre'"),
        ("-3", "", "midline '-3'"),
        ("0", "", "midline '0'"),
        ("nan", "", "midline 'nan'"),
        ("inf", "", "midline 'inf'"),
        ("12", "left", "half 'left'"),
        ("", "first", "half 'first', midline ''"),
    ],
)
def test_midline_and_half_are_checked(tmp_path, midline, half, word):
    path = manifest(tmp_path, f"x,P,test,0,x.nii,,,{midline},{half}", head=f"{HEAD},midline,half")
    if word:
        (line,) = problems(path)
        assert f"line 2: {word}" in line
    else:
        assert rows_of(path)[0].extra == {"midline": midline, "half": half}


def test_a_series_of_contrast_in_two_splits_is_a_leak(tmp_path):
    rows = ["a,P,train,0,a.nii,,,,", "b,Q,test,0,b.nii,,,a.nii,c.nii"]
    (line,) = problems(manifest(tmp_path, *rows, head=f"{HEAD},pre,post"))
    assert "a.nii' is in train and test" in line


def test_misspelt_further_columns_are_named_and_other_words_are_not(tmp_path):
    head = f"{HEAD},Pre,posts,mid_line,Half"
    assert problems(manifest(tmp_path, head=head)) == [
        "column 'pre' is missing: rename 'Pre'",
        "column 'post' is missing: rename 'posts'",
        "column 'midline' is missing: rename 'mid_line'",
        "column 'half' is missing: rename 'Half'",
    ]
    further = "preop,post_id,host,calf"
    (row,) = rows_of(manifest(tmp_path, "a,P,test,0,a.png,,,1,2,3,4", head=f"{HEAD},{further}"))
    assert list(row.extra) == further.split(",")


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path):
    lines = problems(manifest(tmp_path, head="ID,patients,Split,label,file,masks,boxs"))
    assert lines == [
        "column 'id' is missing: rename 'ID'",
        "column 'patient' is missing: rename 'patients'",
        "column 'split' is missing: rename 'Split'",
        "column 'image' is missing: add it",
        "column 'mask' is missing: rename 'masks'",
        "column 'boxes' is missing: rename 'boxs'",
    ]
    assert problems(manifest(tmp_path, head=HEAD + ",mask")) == ["column 'mask' is there 2 times: keep one"]


def test_all_problems_are_told_at_once_and_many_of_a_kind_are_counted(tmp_path):
    rows = [f"a{i},P{i},{split},0,{split}{i}.png,," for i in range(30) for split in ("train", "test")]
    lines = problems(manifest(tmp_path, *rows, "b,Q,val,x,b.png,,"))
    assert sum("is in lines" in line for line in lines) == 20
    assert sum("is in train and test" in line for line in lines) == 20
    assert sum("and 10 more like" in line for line in lines) == 2
    assert sum("label 'x'" in line for line in lines) == 1 and len(lines) == 43


def test_one_fault_of_many_rows_is_one_line(tmp_path):
    row = "a{0},P{0},train,{1},{0}.png,,".format
    (line,) = problems(manifest(tmp_path, *(row(i, "normal") for i in range(16))))
    what = "write 0 (normal), 1 (abnormal) or leave it empty"
    assert line == f"line 2: label 'normal': {what} (and 15 more like it)"
    lines = problems(manifest(tmp_path, *(row(i, "0" if i < 8 else "normal") for i in range(16))))
    assert [line.split(":")[0] for line in lines] == ["line 10", "line 11", "line 12"]
    assert lines[-1].endswith("(and 5 more like it)")


def test_duplicate_ids_are_refused_even_where_one_row_is_ignored(tmp_path):
    (line,) = problems(manifest(tmp_path, "a,P,test,0,a.png,,", "b,P,test,0,b.png,,", "a,Q,extra,0,c.png,,"))
    assert line == "id 'a' is in lines 2, 4: give each row its own"


SPELLINGS = [
    ("P1", "p1"),
    ("Ångström", "A\u030angstro\u0308m"),
    ("ﬁle", "file"),
    ("a  b", "a b"),
    ("Straße", "STRASSE"),
]


@pytest.mark.parametrize("first, second", SPELLINGS)
def test_names_that_differ_by_case_unicode_form_or_spaces_alone_are_one(tmp_path, first, second):
    parse = lambda *lines: parse_manifest(manifest(tmp_path, *lines))[2]
    (leak,) = parse(f"x,{first},train,0,a.png,,", f"y,{second},test,0,b.png,,")
    assert f"patient {first!r} or {second!r} is in train and test" in leak
    (repeated,) = parse(f"{first},,train,0,a.png,,", f"{second},,train,0,b.png,,")
    assert f"id {first!r} or {second!r} is in lines 2, 3: give each row its own" in repeated
    assert not parse(f"x,{first},train,0,a.png,,", f"y,{second},train,0,b.png,,")
    seen = SeenRows([Row("x", first, "train", 0, ())])
    assert seen.leak(Row("y", second, "test", 0, ()), "test") == "the patient of y is that of x, train of the run"
    rows = [Row(f"i{i}", f"P{i // 2}" if i % 2 else f"p{i // 2}", "train", 0, ()) for i in range(40)]
    apart = held_out(rows, 0.1)
    assert apart.any() and (apart[::2] == apart[1::2]).all()


def test_blank_patients_are_patients_of_their_own(tmp_path):
    assert len(rows_of(manifest(tmp_path, "a,,train,0,a.png,,", "b,,test,0,b.png,,"))) == 2


def test_abnormal_training_rows_need_a_mask_even_for_normal_crops(tmp_path):
    path = manifest(tmp_path, "a,P,train,1,a.png,m.png,", "b,Q,train,0,b.png,,")
    assert [row.label for row in rows_of(path, crops=True, normal_crops_only=True)] == [1, 0]
    assert "set data.normal_crops_only" in problems(path, crops=True)[0]
    assert "normal_crops_only" not in problems(path, normal_crops_only=True)[0]  # whole images hold their lesions
    (line,) = problems(manifest(tmp_path, "a,P,train,1,a.png,,"), crops=True, normal_crops_only=True)
    assert "give it a mask" in line


def test_unlabeled_rows_lose_label_mask_and_boxes_and_it_is_said(tmp_path):
    head = f"{HEAD},boxes"
    path = manifest(tmp_path, "a,P,unlabeled,1,a.png,m.png,r.png,1 2 3 4", "b,Q,unlabeled,0,b.png,,,", head=head)
    rows, ignored, _ = parse_manifest(path)
    assert all(row.label is None and row.mask is None and row.boxes == () for row in rows)
    assert rows[0].region == f"{tmp_path}/r.png"
    assert ignored == {"labels of unlabeled rows": 2, "masks of unlabeled rows": 1, "boxes of unlabeled rows": 1}


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEAD.encode("utf-16"), "neither UTF-8 nor Latin-1"),
        ("id,image,split,Größe".encode("mac-roman"), "neither UTF-8 nor Latin-1"),
        (HEAD.encode() + b'\n"a,P,train,0,a.png,,\nb,Q,test,0,b.png,,\n', "quotes"),
        (b"\x89PNG\r\n\x1a\n", "neither UTF-8 nor Latin-1"),
    ],
)
def test_files_that_are_no_such_csv_are_refused(tmp_path, data, word):
    (tmp_path / "m.csv").write_bytes(data)
    (line,) = problems(tmp_path / "m.csv")
    assert word in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_encodings_of_spreadsheets_make_no_difference(tmp_path, separator, encoding):
    lines = [COLUMNS, ("ä1", "Müller", "train", "0", "ä.png", "", ""), ("t", "ß", "test", "1", "a.png;b.png", "", "")]
    with (tmp_path / "m.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    first, second = rows_of(tmp_path / "m.csv")
    assert first == Row("ä1", "Müller", "train", 0, (f"{tmp_path}/ä.png",))
    assert (second.patient, second.image) == ("ß", (f"{tmp_path}/a.png", f"{tmp_path}/b.png"))


def test_split_and_image_are_enough_and_files_name_the_cases(tmp_path):
    rows = ["train,x/a.nii.gz;x/b.nii.gz", "test,y/a.nii.gz", "test,c.png", "test,c.jpg"]
    found = rows_of(manifest(tmp_path, *rows, head="split,image"))
    assert [row.id for row in found] == ["x_a", "y_a", "c.png", "c.jpg"]  # by hand: what tells them apart
    assert all((row.patient, row.label, row.mask, row.region, row.extra) == ("", None, None, None, {}) for row in found)
    assert problems(manifest(tmp_path, "train,,", head="split,image,mask")) == [
        "line 2: image '' is empty, has an empty channel or one twice: name one file a channel"
    ]
    (line,) = problems(manifest(tmp_path, "train,a.png", "test,a.png", head="split,image"))
    assert line.startswith("no column id, and ") and "a.png: is (the first file of) two cases" in line
    assert [row.id for row in read_cases(manifest(tmp_path, "x/a.png", "b.png", head="image"), "new")] == ["a", "b"]


def test_a_missing_manifest_or_a_folder_is_refused(tmp_path):
    assert "No such file" in problems(tmp_path / "none.csv")[0]
    assert problems(tmp_path) == ["a folder: name the manifest.csv in it; jmae prepare writes one"]


def test_ten_thousand_rows_keep_their_order(tmp_path):
    rows = [f"c{i},P{i},train,0,{i}.png,," for i in range(10_000)]
    assert [row.id for row in rows_of(manifest(tmp_path, *rows))] == [f"c{i}" for i in range(10_000)]


def test_the_summary_counts_every_row_used_or_ignored(tmp_path):
    rows = [
        *("a,P,train,0,a.png,,", "b,P,train,0,b.png,,", "c,,train,0,c.png,,", "d,,unlabeled,,d.png,,"),
        *("e,,val,0,e.png,,", "f,,val,1,f.png,,", "g,,test,1,g.png,,", "h,,test,,h.png,,"),
        *("i,,extra,1,i.png,,", "j,,extra,1,j.png,,", "k,,unlabelled,1,k.png,,"),
    ]
    assert summary(*parse_manifest(manifest(tmp_path, *rows))[:2]) == (
        "train 3 normal (1 patient), unlabeled 1, val 1 normal + 1 abnormal, test 1 abnormal + 1 of unknown label; "
        "3 rows of other splits ('extra', 'unlabelled', meant 'unlabeled'?) ignored; "
        "6 rows without a patient: a patient in two splits would not be noticed"
    )


# The files behind it


def picture(path, array):
    pillow.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    grey = np.arange(35).reshape(7, 5)
    for name in ("n1", "n2", "v1", "t1", "a", "b"):
        picture(tmp_path / f"{name}.png", grey + len(name))
    picture(tmp_path / "m.png", grey > 30)
    picture(tmp_path / "r.png", grey > 3)
    picture(tmp_path / "zero.png", grey * 0)
    picture(tmp_path / "wide.png", grey.T)
    picture(tmp_path / "rgb.png", np.stack([grey, grey + 1, grey], -1))
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    return tmp_path


def checked(folder, *rows, head=HEAD, **options):
    return lines_of(open_each(rows_of(manifest(folder, *rows, head=head)), workers=3, **options))


def test_a_line_names_its_case_once():
    row = Row("a", "", "train", 0, ("a.png",))
    whats = "a: no crop fits", "a.png: is empty"
    assert lines_of([Finding("unreadable", (row,), what) for what in whats]) == [
        "a: no crop fits",
        "a: a.png: is empty",
    ]


def test_good_files_have_no_problems(folder):
    rows = [row for row in GOOD if not row.startswith("t2")]
    assert checked(folder, *rows) == []


@pytest.mark.parametrize(
    "row, words",
    [
        ("x,P,test,0,none.png,,", ["none.png: not found: check the path, or delete its row"]),
        ("x,P,test,0,bad.png,,", ["bad.png: seems damaged"]),
        ("x,P,test,0,.,,", ["is a folder"]),
        ("x,P,test,1,a.png,wide.png,", ["wide.png: size (5, 7) differs from (7, 5)"]),
        ("x,P,test,0,a.png,,wide.png", ["wide.png: size (5, 7) differs from (7, 5)"]),
        ("x,P,test,1,a.png,none.png,bad.png", ["none.png: not found", "bad.png: seems damaged"]),
        ("x,P,test,0,none.png;bad.png;a.png,,", ["none.png: not found", "bad.png: seems damaged"]),
        ("x,P,test,0,a.png;wide.png,,", ["wide.png: size (5, 7) differs from (7, 5)"]),
        ("x,P,test,0,none.png,bad.png,", ["none.png: not found", "bad.png: seems damaged"]),
        ("x,P,test,0,rgb.png,,", ["2D with 3 channels where most are 2D with 1"]),
        ("x,P,test,0,a.png;b.png,,", ["2D with 2 channels where most are 2D with 1"]),
        ("x,P,test,0,a.png,m.png,", ["the mask marks 4 values and the label is 0"]),
        ("x,P,test,1,a.png,zero.png,", ["the mask marks 0 values and the label is 1"]),
        ("x,P,test,0,a.png,,zero.png", ["the region marks nothing"]),
    ],
)
def test_each_fault_of_a_file_is_one_line_with_the_case(folder, row, words):
    lines = checked(folder, *GOOD[:4], row)
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith(f"x: {folder}") and word in line and "\n" not in line


@pytest.mark.parametrize(
    "box, inside",
    [("0 0 5 7", True), ("0 0 5.5 7", False), ("0 0 5 8", False), ("-1 0 4 4", False), ("0 0 0 5 7 1", False)],
)
def test_boxes_are_x_along_columns_and_must_lie_in_the_image(folder, box, inside):
    assert (checked(folder, f"x,P,test,1,a.png,,,{box}", head=f"{HEAD},boxes") == []) == inside


def test_a_volume_among_pictures_is_told(folder):
    write_map(folder / "v", np.ones((3, 4, 5)), Image(np.zeros((3, 4, 5, 1)), (1.0,) * 3, None, None))
    (line,) = checked(folder, *GOOD[:4], "x,P,test,0,v.nii.gz,,")
    assert "3D with 1 channels where most are 2D with 1" in line


def test_phantom_rows_need_no_files():
    rows = [Row(f"c{i}", "", "train", 0, (f"phantom:chest/{i}",)) for i in range(3)]
    assert open_each(rows, workers=2) == []


def test_names_with_spaces_and_other_scripts_are_opened(folder):
    os.rename(folder / "a.png", folder / "胸部, снимок é.png")
    with open(folder / "m.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, ("x", "P", "test", "0", "胸部, снимок é.png", "", "")])
    assert open_each(rows_of(folder / "m.csv"), workers=1) == []


def test_series_of_contrast_are_opened_but_may_lie_on_other_grids(folder):
    rows = [
        "x,P,test,0,a.png,,,b.png,wide.png",
        "y,Q,test,0,n1.png,,,bad.png,none.png;wide.png",
        "z,R,test,0,bad.png,,,bad.png,t1.png",
    ]
    lines = checked(folder, *rows, head=f"{HEAD},pre,post")
    assert [line.split(" ")[:2] for line in lines] == [
        ["y:", f"{folder}/bad.png:"],
        ["y:", f"{folder}/none.png:"],
        ["z:", f"{folder}/bad.png:"],
    ]
