"""A Flask route that reads the body and does nothing with it."""

from flask import Flask, request

app = Flask(__name__)


@app.post("/webhooks/persona")
def receive() -> dict:
    """Read the body; keep nothing."""
    request.get_data()
    return {"received": True}
