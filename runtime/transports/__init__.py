"""How an event looks on the wire."""
