"""The pass over one volume, as tests look at it."""

from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.passes import SweepPass


def sweeper(config, sweep, results):
    """The function (volume, its id, repeats) -> the arrays that the pass gives."""
    run = SweepPass(config, sweep, results)

    def score(volume, name, repeats=None):
        row = Row(name, "", "test", None, ("volume",))
        case = Prepared(row=row, array=volume.array, geometry=None, digest="", volume=volume)
        return run.fetch(run.dispatch([case], repeats))[0]

    return score
