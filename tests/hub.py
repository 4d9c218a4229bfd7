"""A model hub on the loopback, which answers as huggingface.co does to the few requests a download makes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def local_hub(models: dict[str, Path | None]) -> Iterator[str]:
    """Serve folders as models by id; None is a gated one. Gives the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            model = next((model for model in models if f"/{model}/" in path + "/"), None)
            if model is None:
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif (folder := models[model]) is None:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif "/revision/" in path:
                self.answer(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode(), {})
            elif "/tree/" in path:
                self.answer(200, json.dumps([_entry(file) for file in sorted(folder.iterdir())]).encode(), {})
            else:
                content = (folder / path.rpartition("/")[2]).read_bytes()
                etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.answer(200, content, etag)

        def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if file.suffix == ".safetensors" else {}
    return {"type": "file", "path": file.name, "size": len(content), "oid": digest[:40], **lfs}
