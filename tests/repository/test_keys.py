"""The names of keys collide with nothing, whatever models and jobs are called."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from asyncinfer.repository import keys

N = "predict_queue"
MODELS = ["default", "queues", "odd", "models", "high", "low", "model:x", "iris", "wake"]

_FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(keys, inspect.isfunction)
    if function.__module__ == keys.__name__ and not name.startswith("__")
}


def named_by(argument: str) -> list[Callable[..., Any]]:
    """The functions of `keys` whose first argument is `argument`."""
    return [
        function
        for function in _FUNCTIONS.values()
        if next(iter(inspect.signature(function).parameters)) == argument
    ]


def names_of(functions: list[Callable[..., Any]], first: str) -> list[str]:
    """What the functions make of `first`, with `x` for whatever else they need."""
    names: list[str] = []
    for function in functions:
        others = len(inspect.signature(function).parameters) - 1
        made = function(first, *["x"] * others)
        names += made if isinstance(made, tuple) else [made]
    return names


def test_the_pattern_finds_its_keys_where_it_looks() -> None:
    assert keys.queue(N, "iris", "iris") == "predict_queue"
    assert keys.queue(N, "digits", "iris") == "predict_queue:digits"
    assert keys.data("1") == "job:1:data"
    assert keys.status("1") == "job:1:status"
    assert keys.result("1") == "job:1:result"
    assert keys.error("1") == "job:1:error"


@pytest.mark.parametrize("model", ["iris", "digits", "default", "predict_queue:"])
def test_the_model_of_a_queue_is_the_one_it_was_made_for(model: str) -> None:
    assert keys.model_of(N, keys.queue(N, model, "iris"), "iris") == model


def test_without_a_default_model_the_bare_queue_is_nobodys() -> None:
    assert keys.queue(N, "iris", None) == "predict_queue:iris"
    assert keys.model_of(N, N, None) is None


def test_the_lists_are_in_the_order_they_are_served() -> None:
    assert keys.waiting(N) == ("{predict_queue}:high", "predict_queue", "{predict_queue}:low")


def test_no_model_name_makes_a_queue_collide_with_another_key() -> None:
    queues = [N, *(f"{N}:{model}" for model in MODELS)]
    per_queue = named_by("q")
    everything = [name for queue in queues for name in names_of(per_queue, queue)]
    everything += names_of([f for f in named_by("n") if f is not keys.queue], N)
    everything = [name for name in everything if name]
    # `model_of` gives a model back, not a key.
    everything = [name for name in everything if name.startswith(("{", N))]
    assert len(everything) == len(set(everything))


def test_all_keys_of_a_queue_but_its_list_share_its_hash_tag() -> None:
    for name in names_of(named_by("q"), "q"):
        assert name == "q" or name.startswith("{q}:")


def test_every_function_is_about_a_job_a_queue_or_all_queues() -> None:
    covered = named_by("job_id") + named_by("q") + named_by("n")
    assert set(covered) == set(_FUNCTIONS.values())


def test_a_digest_hides_who_used_which_key() -> None:
    assert keys.idempotency("q", "abc") == "{q}:idem:abc"
