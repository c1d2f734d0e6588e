"""Values that a step decides on: computed from known integers, stood in for where a router chose, else refused."""

import pytest

pytest.importorskip("torch")

import torch

from ullage.errors import InputError
from ullage.trace.api import trace
from ullage.trace.recorder.temporaries import hidden_temporaries

pytestmark = pytest.mark.reference
IDS = [3, 1, 2, 3, 1, 0]


def traced(read):
    """Trace a step that reads values; return what it read."""
    found = []

    def make():
        net = torch.nn.Linear(4, 4)

        def step():
            found.append(read())
            net(torch.ones(1, 4, device="meta")).sum().backward()

        return net, step

    trace(make, engine="plain", steps=1)
    return found[0]


@pytest.mark.parametrize(
    "read",
    [
        lambda ids: torch.argsort(ids, stable=True),
        lambda ids: torch.sort(ids, stable=True, descending=True).values,
        lambda ids: torch.sort(ids.view(2, 3), dim=0).indices,
        lambda ids: torch.sort(ids.view(2, 3), dim=0, stable=True).values,
        lambda ids: torch.topk(ids, 2).indices,
        lambda ids: ids.argmax(),
        lambda ids: ids.view(2, 3).argmax(dim=0),
    ],
)
def test_what_is_chosen_from_known_integers_is_known(read):
    real = read(torch.tensor(IDS)).tolist()
    assert traced(lambda: read(torch.tensor(IDS, device="cpu").to("meta")).tolist()) == real


def test_a_choice_along_another_dimension_than_the_last_is_not_guessed():
    with pytest.raises(InputError, match="needs values"):
        traced(lambda: torch.sort(torch.rand(3, 5, device="meta"), dim=0, stable=True).indices.tolist())


def test_short_rows_are_sorted_in_place():
    def scratch(shape, **options):
        x = torch.empty(shape, device="meta")
        options = {"stable": False, "dim": -1, "descending": False, **options}
        return hidden_temporaries(torch.ops.aten.sort.stable, (x,), options, None)

    assert scratch((2, 4096)) == [] and scratch((5000, 2)) == []
    assert scratch((5000, 2), dim=0) == scratch((2, 5000)) == [8 * 10000, (4 + 8) * 10000]


def test_an_embedding_adds_ten_rows_at_a_time():
    """Far more tokens than rows make few partial sums, far fewer at least one each."""

    def tables(tokens, rows):
        grad, ids = torch.empty(tokens, 64, device="meta"), torch.empty(tokens, dtype=torch.int64, device="meta")
        args = (grad, ids, rows, -1, False)
        return hidden_temporaries(torch.ops.aten.embedding_dense_backward.default, args, {}, None)

    assert tables(3072, 1000) == []
    assert tables(4000, 100_000) == [8 * 4000] * 3 + [8 * 4000] * 2 + [8 * 4400, 4 * 4400 * 64]
    assert tables(4000, 100) == [8 * 4000] * 3 + [8 * 100] * 2 + [8 * 500, 4 * 500 * 64]
