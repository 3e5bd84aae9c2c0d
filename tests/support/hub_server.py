"""A hub of one repository, ``me/model``, on this machine."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler

from local_server import LocalServer


class Hub(LocalServer):
    """A hub of one repository in memory, with the requests that loading and uploading make."""

    def __init__(self):
        super().__init__(HubHandler)
        self.files, self.tokens, self.revisions = {}, set(), {"main", "v1"}


class HubHandler(BaseHTTPRequestHandler):
    commit = "0" * 40

    def answer(self, status, value=b"", **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.answer(200, {"url": f"{hub.url}/me/model", "name": "me/model"})
        if "preupload" in parts:
            asked = [one["path"] for one in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer(200, {"files": [{"path": one, **regular} for one in asked]})
        if "commit" in parts:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{hub.url}/me/model/commit/{self.commit}", "commitOid": self.commit}
            return self.answer(200, answer | {"pullRequestUrl": None, "commitMessage": "", "commitDescription": ""})
        if "tree" in parts:
            sizes = {name: len(content) for name, content in hub.files.items()}
            listed = [{"type": "file", "path": name, "size": sizes[name], "oid": self.oid(name)} for name in sizes]
            return self.answer(200, listed)
        if parts[:1] == ["api"]:
            revision = parts[parts.index("revision") + 1] if "revision" in parts else "main"
            if revision not in hub.revisions:
                return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files]
            return self.answer(200, {"id": "me/model", "sha": self.commit, "siblings": siblings})
        name = path.partition(f"/resolve/{self.commit}/")[2]
        if name not in hub.files:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
        return self.answer(200, hub.files[name], ETag=f'"{self.oid(name)}"')

    def oid(self, name):
        return hashlib.sha1(self.server.files[name]).hexdigest()

    do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

    def log_message(self, *_):
        pass
