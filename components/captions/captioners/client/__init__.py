"""The client of an OpenAI-compatible service: it limits its rate, keeps a budget, and pays for no answer twice."""
