"""Tests of setup.py against a package index of our own: resume, checksum, a cut-off download, a missing file."""
import hashlib
import http.server
import os
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import setup

BODY = bytes(range(256)) * 4096
NAME = "thing-1.0-py3-none-any.whl"
PACKAGE = ("thing", "1.0")


class Index(http.server.BaseHTTPRequestHandler):
    cut_at = None  # bytes after which the connection closes
    body = BODY
    ranges: list = []

    def do_GET(self):
        if self.path.startswith("/simple/thing/"):
            page = f'<a href="/files/{NAME}#sha256=0">{NAME}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)
        elif self.path == f"/files/{NAME}":
            wanted = self.headers.get("Range")
            type(self).ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if start >= len(self.body):
                self.send_error(416)
                return
            rest = self.body[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[:self.cut_at])
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


class SetupTest(unittest.TestCase):
    def setUp(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        Index.cut_at, Index.body, Index.ranges = None, BODY, []
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"
        for patch in (mock.patch.dict(os.environ, {"PIP_INDEX_URL": url, "no_proxy": "127.0.0.1"}),
                      mock.patch.dict(setup.WHEELS, {PACKAGE: {"any": (NAME, hashlib.sha256(BODY).hexdigest())}})):
            patch.start()
            self.addCleanup(patch.stop)

    def test_a_download_is_checked_and_kept(self):
        self.assertEqual(setup.download(PACKAGE, self.folder).read_bytes(), BODY)
        setup.download(PACKAGE, self.folder)
        self.assertEqual(len(Index.ranges), 1)

    def test_a_cut_off_download_goes_on_where_it_stopped(self):
        Index.cut_at = 100_000
        with self.assertRaisesRegex(setup.SetupError, "cut off.*make setup"):
            setup.download(PACKAGE, self.folder)
        Index.cut_at = None
        self.assertEqual(setup.download(PACKAGE, self.folder).read_bytes(), BODY)
        self.assertEqual(Index.ranges, [None, "bytes=100000-"])

    def test_a_complete_part_needs_no_more_bytes(self):
        (self.folder / (NAME + ".part")).write_bytes(BODY)
        self.assertEqual(setup.download(PACKAGE, self.folder).read_bytes(), BODY)

    def test_a_wrong_checksum_is_refused_and_removed(self):
        Index.body = BODY[:-1] + b"!"
        with self.assertRaisesRegex(setup.SetupError, "wrong checksum: expected sha256 .* got .*make setup"):
            setup.download(PACKAGE, self.folder)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_an_index_without_the_file(self):
        with mock.patch.dict(setup.WHEELS, {PACKAGE: {"any": ("other.whl", "0")}}):
            with self.assertRaisesRegex(setup.SetupError, "no other.whl"):
                setup.download(PACKAGE, self.folder)

    def test_no_index(self):
        with mock.patch.dict(os.environ, {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}):
            with self.assertRaisesRegex(setup.SetupError, "did not answer.*make setup"):
                setup.download(PACKAGE, self.folder)

    def test_a_processor_without_a_build(self):
        with mock.patch("platform.machine", return_value="armv7l"):
            with self.assertRaisesRegex(setup.SetupError, "armv7l.*64-bit"):
                setup.wheel_of(setup.TORCH)


if __name__ == "__main__":
    unittest.main()
