import os


def opening() -> str:
    return os.environ["OWN_RUNTIME_GREETING"]
