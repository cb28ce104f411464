"""A small shop: its orders, and the carrier that brings them."""

import asyncio
from dataclasses import dataclass

from pace import PACE

from runtime.resilience import resilient


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    number: int
    what: str
    cents: int
    status: str
    parcel: str | None = None

    @property
    def price(self) -> str:
        return f"{self.cents // 100},{self.cents % 100:02} €"


ORDERS = {
    order.number: order
    for order in (
        Order(number=1001, what="una lámpara de mesa", cents=3995, status="entregado"),
        Order(number=1002, what="dos tazas", cents=2450, status="enviado", parcel="ES-7731"),
        Order(number=1003, what="una silla", cents=8990, status="entregado"),
        Order(number=1004, what="un reloj de pared", cents=5500, status="en preparación"),
    )
}

#: The orders that were paid back. An order is paid back once, however often it is asked for:
#: a run that is recovered after a crash may ask again.
paid_back: set[int] = set()


class Carrier:
    """Knows where parcels are. It does not answer the first question of a visit."""

    def __init__(self) -> None:
        self._awake = False

    @resilient(attempts=3, multiplier=0.3 * PACE, min_s=0.3 * PACE, max_s=PACE)
    async def where(self, parcel: str) -> str:
        await asyncio.sleep(0.1 * PACE)
        if not self._awake:
            self._awake = True
            raise ConnectionError("the carrier does not answer")
        return f"El paquete {parcel} está en reparto: llega hoy antes de las 20:00."
