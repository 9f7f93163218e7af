"""Secrets are hidden in names and values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.redact import redact_value

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", "hf_abc", "***"),
        ("HF_TOKEN", "", ""),
        ("http_proxy", "http://me:pw@proxy:3128", "http://***@proxy:3128"),
        ("HTTPS_PROXY", "http://me:p@s/w:?d@proxy:3128", "http://***@proxy:3128"),
        ("http_proxy", "me:pw@proxy:3128", "***@proxy:3128"),
        ("PIP_INDEX_URL", "https://pw@pypi.example/simple", "https://***@pypi.example/simple"),
        ("http_proxy", "http://proxy:3128", "http://proxy:3128"),
        ("MAINTAINER", "me@example.org", "me@example.org"),
        ("VLLM_ARGS", "--model m --api-key abc --port 8000", "--model m --api-key *** --port 8000"),
        ("VLLM_ARGS", "--api-key=abc -tp 2", "--api-key=*** -tp 2"),
        ("CALLBACK", "http://host/x?token=abc&size=3", "http://host/x?token=***&size=3"),
        ("SETTINGS", '{"user": "me", "password": "a b", "size": 3}', '{"user": "me", "password": ***, "size": 3}'),
        ("OTEL_HEADERS", "authorization=Bearer abc", "authorization=***"),
        ("OPENAI_KEY", "abc", "***"),
        ("SETTINGS", "took hf_abcdefghijklmnop", "took ***"),
        ("CURL_ARGS", "-u me:pw", "-u ***"),
        ("HCCL_IF_IP", "10.0.0.1", "10.0.0.1"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "expandable_segments:True"),
    ],
)
def test_redact_value(name: str, value: str, expected: str) -> None:
    assert redact_value(name, value) == expected


@given(st.text("abc/:@?#&=,;! 1", min_size=1))
def test_a_password_of_any_characters_in_a_url_is_hidden(password: str) -> None:
    assert redact_value("http_proxy", f"http://me:{password}@proxy:3128") == "http://***@proxy:3128"


@given(st.text(), st.text())
def test_any_name_and_value_can_be_redacted(name: str, value: str) -> None:
    assert isinstance(redact_value(name, value), str)
