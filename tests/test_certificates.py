"""Names in certificates, and files that are not what they should be."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.certificates import is_for, load_authorities, load_own, load_revoked


def certificate(*names: tuple[str, str], common_name: str = "") -> dict[str, Any]:
    subject = (((("commonName", common_name),),) if common_name else ()) + ()
    return {"subject": subject, "subjectAltName": names}


@pytest.mark.parametrize(
    "names, name, right",
    [
        ([("IP Address", "127.0.0.1")], "127.0.0.1", True),
        ([("IP Address", "127.0.0.1")], "127.0.0.2", False),
        ([("IP Address", "0:0:0:0:0:0:0:1")], "::1", True),
        ([("IP Address", "nonsense")], "::1", False),
        ([("DNS", "127.0.0.1")], "127.0.0.1", False),
        ([("DNS", "a.example.org")], "A.example.org.", True),
        ([("DNS", "a.example.org")], "b.example.org", False),
        ([("DNS", "*.example.org")], "b.example.org", True),
        ([("DNS", "*.example.org")], "c.b.example.org", False),
        ([("DNS", "*.example.org")], "example.org", False),
        ([("DNS", "*.org")], "example.org", False),
        ([("DNS", "*")], "example", False),
        ([("DNS", "w*.example.org")], "www.example.org", False),
        ([("DNS", "a.*.org")], "a.b.org", False),
        ([("DNS", "")], "", False),
        ([("email", "a.example.org")], "a.example.org", False),
        ([], "a", False),
    ],
)
def test_names_are_compared_strictly(names: list[tuple[str, str]], name: str, right: bool) -> None:
    """As a name's owner would want it."""
    assert is_for(certificate(*names), name) is right


def test_the_common_name_counts_only_where_there_is_no_other() -> None:
    """As older certificates have it."""
    assert is_for(certificate(common_name="a.example.org"), "a.example.org")
    assert not is_for(certificate(("DNS", "b"), common_name="a.example.org"), "a.example.org")
    assert not is_for(certificate(common_name="127.0.0.1"), "127.0.0.1")


def test_what_is_wrong_with_a_file_names_it(tmp_path: Path) -> None:
    """And says what should be in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    text = str(tmp_path / "text")
    Path(text).write_bytes(b"x")
    nothing = str(tmp_path / "nothing")
    for load in (load_authorities, load_revoked):
        for file in (text, nothing):
            with pytest.raises(OSError) as caught:
                load(context, file)
            assert caught.value.filename == file
    for certificate_, key in ((text, None), (nothing, text), (text, nothing), (text, text)):
        with pytest.raises(OSError) as caught:
            load_own(context, certificate_, key)
        assert (nothing if nothing in (certificate_, key) else text) in caught.value.filename


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    """Both are named."""
    first, second = (trustme.CA().issue_cert("localhost") for _ in range(2))
    key, cert = tmp_path / "key", tmp_path / "cert"
    first.private_key_pem.write_to_path(str(key))
    second.cert_chain_pems[0].write_to_path(str(cert))
    with pytest.raises(OSError) as caught:
        load_own(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), str(cert), str(key))
    assert caught.value.filename == f"{cert} and {key}"
