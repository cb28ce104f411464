"""What the assistant can do for a customer."""

import ast
import asyncio
import operator
from collections.abc import Callable

from langchain_core.tools import BaseTool, ToolException, tool
from pace import PACE
from shop import ORDERS, Carrier, Order, paid_back

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


@tool
def calculate(expression: str) -> str:
    """Work out a sum of numbers with + - * / and brackets, such as "3 * (2 + 0.5)"."""
    try:
        result = _value(ast.parse(expression.strip()[:200], mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError) as exc:
        raise ToolException(f"No sé calcular {expression!r}.") from exc
    return f"{expression.strip()} = {result:.10g}"


@tool
async def find_order(number: int) -> str:
    """Look up an order by its number: what was bought, its price and its status."""
    await asyncio.sleep(0.1 * PACE)
    order = _order(number)
    return f"Pedido {number}: {order.what}, {order.price}, {order.status}."


@tool
async def track_parcel(number: int) -> str:
    """Ask the carrier where the parcel of an order is, by the number of the order."""
    if (parcel := _order(number).parcel) is None:
        return f"El pedido {number} no tiene ningún paquete en camino."
    return await Carrier().where(parcel)


@tool
async def refund_order(number: int) -> str:
    """Pay an order back. A person is asked first, so do not ask for permission yourself."""
    order = _order(number)
    paid_back.add(number)
    return f"Devueltos {order.price} del pedido {number}."


TOOLS: list[BaseTool] = [calculate, find_order, track_parcel, refund_order]
#: The names of those that a person must agree to.
DANGEROUS = {refund_order.name}


def _order(number: int) -> Order:
    if (order := ORDERS.get(number)) is None:
        raise ToolException(f"No hay ningún pedido {number}.")
    return order


def _value(node: ast.expr) -> float:
    """Numbers and the four operations only: what is to be worked out is somebody else's text."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_value(operand))
        case _:
            raise KeyError(type(node).__name__)
