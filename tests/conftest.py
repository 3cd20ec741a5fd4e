"""An S3-compatible server in this process: the real one is never asked."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from pyarrow import fs


class LocalS3:
    """A server on loopback, and how to reach it."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.fs = fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=endpoint, region="us-east-1",
                                  allow_bucket_creation=True, allow_bucket_deletion=True)  # fmt: skip

    def uri(self, path: str, user: str = "") -> str:
        """Address with the endpoint in it."""
        return f"s3://{user}{path}?region=us-east-1&endpoint_override={quote(self.endpoint, safe='')}"

    def write(self, path: str, data: bytes) -> None:
        with self.fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    from moto.server import ThreadedMotoServer  # most tests do without

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield LocalS3(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """The server with an empty bucket "lab", and the environment that leads to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_server.fs.create_dir("lab")
    yield s3_server
    s3_server.fs.delete_dir("lab")
