"""As LangGraph's template has it."""

from agent.graph import graph

__all__ = ["graph"]
