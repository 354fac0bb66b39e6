"""Who is let in: hosts, tokens, sessions and the secret that they rest on."""

import socket
import stat

import pytest

from alignjax.core.errors import UserError
from alignjax.web.access import is_loopback, load_key, make_access

KEY = bytes(range(32))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2", "LOCALHOST"])
def test_this_machine_needs_no_token(host):
    access = make_access(host, key=KEY)
    assert is_loopback(host) and access.token is None and access.is_token("")
    for good in ("127.0.0.1:8377", "localhost:9", "LocalHost", "[::1]:8377", "localhost.:80"):
        assert access.is_host(good), good
    for bad in ("evil.example:8377", "192.168.1.7:8377", "localhost.evil.example", "", "[", "10.1"):
        assert not access.is_host(bad), bad


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "box.example"])
def test_others_need_one(host):
    access = make_access(host, key=KEY)
    assert not is_loopback(host) and len(access.token) == 32
    assert access.is_token(access.token)
    for bad in ("", access.token[:-1], access.token + "0", "ä"):
        assert not access.is_token(bad)
    # It follows from the key: the address stays good when the server starts again.
    assert make_access(host, key=KEY).token == access.token
    assert make_access(host, key=KEY[::-1]).token != access.token
    # Any address, since no site can have one for its name, but not any name.
    assert access.is_host("192.168.1.7:8377") and access.is_host("[fe80::1]:8377")
    assert access.is_host(socket.gethostname()) and not access.is_host("evil.example")
    assert make_access(host, key=KEY, names=["Rank.example"]).is_host("rank.example")


def test_a_token_of_ones_own():
    access = make_access("127.0.0.1", key=KEY, token="x" * 16)
    assert access.is_token("x" * 16) and not access.is_token("")
    with pytest.raises(UserError, match="--token: has 15 characters; expected 16 or more"):
        make_access("127.0.0.1", key=KEY, token="x" * 15)


def test_sessions_prove_themselves():
    access, other = make_access("::1", key=KEY), make_access("::1", key=KEY[::-1])
    session = access.new_session()
    assert access.is_session(session) and access.new_session() != session
    nonce = session.partition(".")[0]
    for bad in ("", ".", nonce, f"{nonce}.", f"x{session}", other.new_session()):
        assert not access.is_session(bad)
    # One that was given out before a token was asked for is none any more.
    assert not make_access("::1", key=KEY, token="x" * 16).is_session(session)
    assert access.identity == make_access("::1", key=KEY).identity != other.identity
    assert access.is_csrf(session, access.csrf(session))
    for bad in ("", access.csrf(access.new_session()), other.csrf(session), session):
        assert not access.is_csrf(session, bad)


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "s.key"
    key = load_key(path)
    assert load_key(path) == key and len(set(key)) > 16
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"")
    with pytest.raises(UserError, match="expected 32 bytes, came 0; delete it"):
        load_key(path)
    with pytest.raises(UserError, match="cannot be written: No such file"):
        load_key(tmp_path / "no" / "s.key")
