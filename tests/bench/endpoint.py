"""A small stand-in of an endpoint that fails on purpose: for what a healthy server cannot be made to do."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        listed = json.dumps({"data": [{"id": "stand-in"}] if self.server.lists else []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(listed)))
        self.end_headers()
        self.wfile.write(listed)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, body, self.headers.get("Authorization")))
        with server.lock:
            server.running += 1
            running = server.running
        if running <= server.most:
            self._stream(body, running)
        else:
            self._refuse()

    def _leave(self):
        """Before the last word: whoever asks again because of it is not one too many."""
        with self.server.lock:
            self.server.running -= 1

    def _refuse(self):
        self._leave()
        self.send_response(503)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"no memory")

    def _stream(self, body, running):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        count = body["max_tokens"]
        for number in range(count):
            time.sleep(self.server.pause * (running if self.server.slows else 1))
            self.event({"choices": [{"text": f" w{number}"}]})
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": count}
        self.event({"choices": [], "usage": usage})
        self._leave()
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_words):
        pass


@contextmanager
def endpoint(*, most=10**6, pause=0.002, slows=False, lists=True):
    """Serve until the end of the block; more than ``most`` requests at a time are refused."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.most, server.pause, server.slows, server.lists = most, pause, slows, lists
    server.running, server.lock, server.seen = 0, threading.Lock(), []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
