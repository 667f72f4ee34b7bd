"""Servers that tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from support.object_server import ObjectServer, object_server


@pytest.fixture(scope="session")
def _object_server() -> Iterator[ObjectServer]:
    """Its clients' sessions, one a command, share what botocore reads of its own: 150 ms of JSON each."""
    import botocore.session

    shared = cache(botocore.session.create_loader)
    with object_server() as served, mock.patch("botocore.session.create_loader", shared):
        yield served


@pytest.fixture
def s3(_object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectServer:
    """An S3 with the bucket ``models``, to which the environment leads; it has counted nothing yet."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": _object_server.url,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    _object_server.forget()
    return _object_server
