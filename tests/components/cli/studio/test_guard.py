"""Who may talk to the studio."""

import asyncio

from components.cli.studio.guard import Guard

TOKEN = "a-token-of-some-length"


def ask(method="GET", path="/", query="", token="", local=True, **headers):
    """The status and the headers of the guarded application's answer."""
    answers = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    async def send(message):
        answers.append(message)

    headers = {"host": "127.0.0.1:7860", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(Guard(application, token, 7860, local)(scope, None, send))
    return answers[0]["status"], {name.decode(): value.decode() for name, value in answers[0]["headers"]}


def test_a_page_of_another_site_can_neither_read_nor_order_anything():
    assert ask()[0] == ask(host="localhost:7860")[0] == ask(host="[::1]:7860")[0] == 200
    assert ask(host="evil.example")[0] == 421
    assert ask("POST", origin="http://evil.example")[0] == 403
    assert ask("POST", origin="null")[0] == 403
    assert ask("POST", origin="http://127.0.0.1:7860")[0] == 200
    assert "default-src 'self'" in ask()[1]["content-security-policy"]


def test_with_a_token_every_request_needs_it_and_a_browser_gives_it_once():
    assert ask(token=TOKEN)[0] == ask(token=TOKEN, query="token=wrong")[0] == 401
    assert ask("POST", token=TOKEN, query=f"token={TOKEN}")[0] == 401
    assert ask(token=TOKEN, authorization=f"Bearer {TOKEN}")[0] == 200
    status, headers = ask(
        token=TOKEN, path="//evil.example/runs", query=f"a=1&token={TOKEN}", local=False, host="box:7860"
    )
    assert (status, headers["location"]) == (303, "/evil.example/runs?a=1")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert ask(token=TOKEN, cookie=cookie.partition(";")[0])[0] == 200
