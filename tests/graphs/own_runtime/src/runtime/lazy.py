"""Imported by nothing until a node runs."""


def shout(word: str) -> str:
    from .words import opening

    return f"{opening()} {word}".upper()
