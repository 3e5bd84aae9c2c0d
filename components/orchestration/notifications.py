"""Telling people how a run ended: one JSON report, posted to the address in UNIVIGU_NOTIFY_URL."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

NOTIFY_URL = "UNIVIGU_NOTIFY_URL"


def send(report: Mapping[str, Any]) -> str:
    """Post a report; returns whether anybody was told, in words.

    The address is a secret, and in no message. A receiver that fails is said, and fails nothing.
    """
    url = os.environ.get(NOTIFY_URL, "")
    if not url:
        return f"nobody was notified: {NOTIFY_URL} is not set"
    if not url.startswith(("http://", "https://")):
        return f"nobody was notified: {NOTIFY_URL} holds no http or https address"
    try:
        request = urllib.request.Request(url, json.dumps(report).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10):
            return "the receiver was notified"
    except (OSError, ValueError, http.client.HTTPException) as error:
        told = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        return f"nobody was notified: the receiver failed ({told})"
