"""Notify people how a run ended: one JSON report is posted to the address in UNIVIGU_NOTIFY_URL."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import httpx2

NOTIFY_URL = "UNIVIGU_NOTIFY_URL"
TIMEOUT_S = 10.0


def send(report: Mapping[str, Any]) -> str:
    """Post a report; returns one sentence that says whether it was delivered.

    The address is a secret: no message and no log line holds it, and redirects are not followed. A receiver that fails
    raises no error.
    """
    url = os.environ.get(NOTIFY_URL, "")
    if not url:
        return f"no notification sent: {NOTIFY_URL} is not set"
    if not url.startswith(("http://", "https://")):
        return f"no notification sent: {NOTIFY_URL} is not an http or https address"
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs the address of each request at level INFO
    try:
        status = httpx2.post(url, json=dict(report), timeout=TIMEOUT_S, follow_redirects=False).status_code
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        return f"no notification sent: the receiver failed ({type(error).__name__})"
    if not 200 <= status < 300:
        return f"no notification sent: the receiver failed (status {status})"
    return "notification sent"
