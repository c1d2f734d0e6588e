"""A rank killed between the renames of a checkpoint leaves parts of two steps; all go back to the step they share."""

import contextlib

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


class Votes:
    """The votes of two ranks that are asked in turn in one process: what the others say is known."""

    def __init__(self, rank, others):
        self.rank, self.size, self.others = rank, 2, others

    def exchange(self, value):
        if not self.others:
            raise ConnectionError("the other rank was killed")
        return [value, *self.others.pop(0)]

    def vote(self, code):
        from types import SimpleNamespace

        return SimpleNamespace(code=code)


def save(path, rank, step, *, killed=False):
    """Save a step; ``killed``: the other rank, after the vote and before it has renamed."""
    from ullage.guard import Checkpoint

    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, step)
    with contextlib.suppress(ConnectionError):
        votes = Votes(rank, [] if killed else [[True]])
        assert Checkpoint(path, every=1, position=lambda: step).save(votes, step, {"model": model}) == ""


def restore(path, rank, *others):
    from ullage.guard import Checkpoint

    model = torch.nn.Linear(1, 1)
    step, position = Checkpoint(path, every=1).restore(Votes(rank, list(others)), {"model": model})
    assert model.weight.item() == step == position
    return step


def test_the_newest_step_that_all_have_is_restored(tmp_path):
    path = tmp_path / "checkpoint"
    for step in (3, 6):
        save(path, 0, step)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.rank-0"]
    save(path, 0, 9, killed=True)
    assert restore(path, 0, [9], [9]) == 9
    assert restore(path, 0, [6], [6]) == 6


def test_a_kill_between_the_two_renames_leaves_the_part_before(tmp_path):
    path = tmp_path / "checkpoint"
    save(path, 1, 6)
    (tmp_path / "checkpoint.rank-1").replace(tmp_path / "checkpoint.rank-1.before")
    assert restore(path, 1, [9], [6]) == 6


def test_parts_that_share_no_step_are_refused(tmp_path):
    from ullage.errors import InputError

    path = tmp_path / "checkpoint"
    save(path, 0, 9)
    with pytest.raises(InputError, match="different steps"):
        restore(path, 0, [3], [3])
