"""Tools for the kitchen: edge-gemma listen BUNDLE --voice en --tools examples/kitchen_tools.py"""

from typing import Annotated, Literal

GRAMS = {"cup of flour": 120, "cup of sugar": 200, "tablespoon of butter": 14}


def in_grams(
    amount: Annotated[float, "how many"],
    what: Literal["cup of flour", "cup of sugar", "tablespoon of butter"],
) -> str:
    """Weigh an ingredient in grams."""
    return f"{amount * GRAMS[what]:g} grams"


def oven(degrees_celsius: Annotated[int, "0 turns it off"]) -> str:
    """Heat the oven."""
    return f"the oven goes to {degrees_celsius} degrees"


oven.dangerous = True  # asked first; a text would be the question
