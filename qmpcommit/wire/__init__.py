"""What travels by HTTP, as pydantic models."""
