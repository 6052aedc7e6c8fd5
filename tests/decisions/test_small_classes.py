"""Which classes are far smaller than those their neighbours come from, and the sentence that says so."""

import pytest

from pipeline.decisions.small_classes import OUTVOTED_FROM, SmallClass, hint, small_classes


def named(counts: dict[str, int]) -> list[str]:
    return [small.label for small in small_classes(counts)]


@pytest.mark.parametrize(
    ("counts", "small"),
    [
        ({}, []),
        ({"only": 3}, []),
        ({"a": 200, "b": 200, "none left": 0}, []),
        ({f"class {number}": 200 for number in range(10)} | {"wolf": 20}, ["wolf"]),
        ({f"class {number}": 200 for number in range(10)} | {"wolf": 50}, ["wolf"]),
        ({f"class {number}": 200 for number in range(10)} | {"wolf": 51}, []),
        ({f"class {number}": 5 for number in range(100)}, []),  # all of them are small, and none is beside the others
        ({"dog": 1_000, "cat": 900, "wolf": 100, "fox": 5}, ["fox", "wolf"]),
        ({"huge": 1_000_000} | {f"class {number}": 100 for number in range(10)}, [f"class {n}" for n in range(10)]),
        # A long tail of singletons does not make the classes that most entries are in look large by itself.
        ({f"class {number}": 10 for number in range(100)} | {f"one {number}": 3 for number in range(50)}, []),
    ],
)
def test_small_is_a_quarter_of_what_most_entries_are_among(counts: dict[str, int], small: list[str]) -> None:
    assert OUTVOTED_FROM == 4
    assert named(counts) == small


def test_the_hint_names_the_smallest_and_the_way_out() -> None:
    assert hint(()) == ""
    assert hint([SmallClass("wolf", 20, 200)]) == (
        "wolf (20 entries) is a class far smaller than others (200), which outvote it: ask with `--balance auto`"
    )
    several = hint([SmallClass("fox", 1, 200), SmallClass("wolf", 20, 200)])
    assert several.startswith("fox (1 entry) and 1 more are classes far smaller than others (200)")
    assert several.endswith("ask with `--balance auto`")
