"""Spec objects survive the way to JSON and back, and wrong JSON is refused with its place."""

import json

import pytest

from ullage.catalog.models import Found, entries, load_entry
from ullage.errors import InputError
from ullage.spec.codec import decode, decode_model, encode
from ullage.spec.machine import Gpu
from ullage.spec.model import Attention, DenseFFN, Layer, Model, Norm


def small_model(num_layers=5, **changes):
    local = Layer(mixers=(Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=64),), ffns=(), norms=())
    full = Layer(
        mixers=(Attention(num_heads=4, num_kv_heads=2, head_dim=8),),
        ffns=(DenseFFN(intermediate_size=64),),
        norms=(Norm(name="input_layernorm", size=32),),
    )
    layers = tuple(full if index % 3 == 2 else local for index in range(num_layers))
    fields = {"name": "small", "architecture": "Small", "hidden_size": 32, "vocab_size": 100, "dtype": "bfloat16"}
    return Model(**{**fields, "layers": layers, "final_norms": (Norm(name="norm", size=32),), **changes})


def test_a_model_survives_json():
    model = small_model(max_position_embeddings=2048, assumed=("one", "two"))
    assert decode_model(json.loads(json.dumps(encode(model)))) == model


def test_runs_of_layers_refer_to_earlier_ones():
    runs = encode(small_model())["layers"]
    assert [run["count"] for run in runs] == [2, 1, 2]
    assert runs[2]["layer"] == 0


def test_equal_layers_are_one_object_after_decoding():
    layers = decode_model(encode(small_model())).layers
    assert layers[0] is layers[1] is layers[3]


def test_every_catalog_entry_survives_json():
    assert len(entries()) > 100
    for entry in entries()[::7]:
        model = load_entry(Found(entry=entry, name=entry["name"]))
        assert decode_model(json.loads(json.dumps(encode(model)))) == model


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"surprise": 1}, "surprise"),
        ({"kind": "Model"}, "kind"),
        ({"layers": {}}, "layers"),
        ({"layers": [{"count": 0, "layer": 0}]}, "layers[0].count"),
        ({"layers": [{"count": 10**9, "layer": 0}]}, "layers[0].count"),
        ({"layers": [{"count": 1, "layer": 0}]}, "layers[0].layer"),
        (
            {"layers": [{"count": 1, "layer": {"mixers": [{"kind": "Nothing"}], "ffns": [], "norms": []}}]},
            "mixers[0].kind",
        ),
        ({"final_norms": [{"name": "n", "size": 3, "kind": "other"}]}, "final_norms[0].kind"),
    ],
)
def test_wrong_json_is_refused_with_its_place(change, place):
    with pytest.raises(InputError) as caught:
        decode_model({**encode(small_model()), **change}, where="file")
    assert place in str(caught.value)


def test_a_missing_field_is_named():
    values = encode(small_model())
    del values["vocab_size"]
    with pytest.raises(InputError, match="vocab_size"):
        decode_model(values)


def test_other_spec_objects_survive_too():
    gpu = Gpu(
        name="x",
        total_bytes=3,
        total_low_bytes=2,
        total_high_bytes=4,
        flops=(("bfloat16", 1e12),),
        compute_capability=(9, 0),
    )
    assert decode(Gpu, json.loads(json.dumps(encode(gpu)))) == gpu
