"""The pass over one volume, as tests look at it."""

from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.passes import SweepPass


def sweeper(config, sweep, results):
    """The function (volume, words of its key, repeats) -> the arrays that the pass gives."""
    run = SweepPass(config, sweep, results)
    row = Row("volume", "", "test", None, ("volume",))

    def score(volume, words, repeats=None):
        case = Prepared(row=row, array=volume.array, geometry=None, digest="", volume=volume)
        return run.fetch(run.dispatch([case], [words], repeats))[0]

    return score
