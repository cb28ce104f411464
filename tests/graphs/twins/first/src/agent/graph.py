from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from agent.who import NAME


class State(TypedDict, total=False):
    names: list[str]


def tell(state: State) -> State:
    from agent import late

    return {"names": [NAME, late.NAME]}


graph = StateGraph(State).add_node(tell).add_edge(START, "tell")
