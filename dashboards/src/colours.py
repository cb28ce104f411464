"""What colours mean, on every dashboard."""

from __future__ import annotations

__all__ = ["BLUE", "GREEN", "GREY", "MEANING", "ORANGE", "RED", "YELLOW"]

GREEN, RED, ORANGE, GREY = "green", "red", "orange", "#8e8e8e"
YELLOW, BLUE, DARK_RED = "yellow", "blue", "dark-red"

#: Series that are called so have this colour wherever they are drawn.
MEANING = {
    "success": GREEN,
    "complete": GREEN,
    "exported": GREEN,
    "accepted": GREEN,
    "sent": GREEN,
    "pass": GREEN,
    "kept": GREEN,
    "recovered": GREEN,
    "error": RED,
    "failed": RED,
    "fail": RED,
    "refused": RED,
    "storage": RED,
    "exhausted": DARK_RED,
    "lost": DARK_RED,
    "expired": RED,
    "slow_consumer": RED,
    "dropped_queue_full": DARK_RED,
    "timeout": ORANGE,
    "queue_full": ORANGE,
    "dropped_budget": ORANGE,
    "retried": YELLOW,
    "limit": YELLOW,
    "server_shutdown": YELLOW,
    "interrupted": BLUE,
    "cancelled": GREY,
    "client_disconnect": GREY,
    "draining": GREY,
    "sampled_out": GREY,
    "discarded": GREY,
    "first": BLUE,
    "retry": YELLOW,
    "busy": BLUE,
    "free": GREEN,
}
