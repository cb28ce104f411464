import os

from . import words


def greet(name: str) -> str:
    return f"{words.opening()}, {name}{os.environ['OWN_RUNTIME_MARK']}"
