"""How a service that charges for its answers is asked: politely, within a budget, and for nothing twice."""
