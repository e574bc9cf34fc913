"""A Hugging Face hub on loopback, with the answers that huggingface_hub goes by.

Two servers, as there: pages, small files and what is known of each file come from the hub; the bytes of large files
come from a storage at another address, which the hub sends to, and which gets no token.
"""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx")


class Hub:
    """Models by name; a context manager that serves them.

    Attributes:
      models: {name: {revision: {file: bytes}}}; a revision that is none of main's counts as a tag.
      gated: names whose files want TOKEN.
      asked: [(method, path)] of the hub and the storage, in order.
      sent: [(file, first byte, authorization)] of the storage.
      cut: {file: bytes after which the storage hangs up, once}.
      status: what both answer everything with, unless it is None.
    """

    def __init__(self):
        self.models, self.gated, self.asked, self.sent, self.cut, self.status = {}, set(), [], [], {}, None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._hub, self._storage = (stack.enter_context(_serving(self, handler)) for handler in (_Pages, _Storage))
            self._stack = stack.pop_all()
        self.address, self.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in (self._hub, self._storage))
        return self

    def __exit__(self, *_):
        self._stack.close()

    def environment(self, home):
        """Variables that lead to it, with the cache in a folder."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fetched(self):
        """The names of the files that were sent, since the last call."""
        files = [path.rsplit("/", 1)[-1] for method, path in self.asked if method == "GET" and "/resolve/" in path]
        self.asked.clear()
        return sorted(files)

    def find(self, name, revision):
        """(commit, files) of a model, or the code of the hub's error."""
        if name not in self.models:
            return "RepoNotFound"
        for branch, files in self.models[name].items():
            if revision in (branch, commit_of(files)):
                return commit_of(files), files
        return "RevisionNotFound"


def commit_of(files):
    """The commit of these files: 40 hexadecimal digits."""
    return hashlib.sha1(json.dumps({name: _sha256(content) for name, content in files.items()}).encode()).hexdigest()


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _serving(hub, handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub})) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append((self.command, path))
        if self.hub.status is not None:
            return self.answer(self.hub.status)
        self.get([part for part in path.split("/") if part])

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        file = self.path.rsplit("/", 1)[-1]  # a bar's label
        self.send_header("Content-Disposition", f"inline; filename*=UTF-8''{file}; filename=\"{file}\";")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, b'{"error":"no"}', X_Error_Code=code, X_Error_Message=f"{code}, says the hub")


class _Pages(_Handler):
    """/api/models/OWNER/NAME[/revision/REVISION], and /OWNER/NAME/resolve/REVISION/FILE."""

    def get(self, parts):
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            name, revision, file = "/".join(parts[2:4]), "/".join(parts[5:]) or "main", None
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, revision, file = "/".join(parts[:2]), "/".join(parts[3:-1]), parts[-1]
        else:
            return self.answer(404)
        found = self.hub.find(name, revision)
        if isinstance(found, str):
            return self.refuse(404, found)
        commit, files = found
        if file is None:
            page = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(page).encode(), Content_Type="application/json")
        token = self.headers.get("authorization")
        if name in self.hub.gated and token != f"Bearer {TOKEN}":
            return self.refuse(403 if token else 401, "GatedRepo")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[file]
        if not file.endswith(LARGE):
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{etag}"')
        self.answer(
            302,
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{_sha256(content)}"',
            X_Linked_Size=str(len(content)),
            Location=f"{self.hub.storage}/{name}/{commit}/{file}",
        )


class _Storage(_Handler):
    """/OWNER/NAME/COMMIT/FILE, from any byte on."""

    def get(self, parts):
        _, files = self.hub.find("/".join(parts[:2]), parts[2])
        file, content = parts[3], files[parts[3]]
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.hub.sent.append((file, begin, self.headers.get("authorization")))
        rest = content[begin:]
        range_ = {"Content_Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        end = self.hub.cut.pop(file, None)
        self.answer(206 if begin else 200, rest[:end], Content_Length=str(len(rest)), **range_)
        if end is not None:
            self.close_connection = True
