"""The user's configuration decides where artifacts come from; secrets stay out of what is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from drydock.errors import DrydockError
from drydock.indexes import Indexes, Location, debian_mirrors, read_indexes, redact, uv_arguments


def read(tmp_path: Path, **environ: str) -> Indexes:
    """Read a configuration of nothing but these variables and what lies in tmp_path/{home,etc,venv}."""
    base = {"HOME": str(tmp_path / "home"), "VIRTUAL_ENV": str(tmp_path / "venv")}
    return read_indexes(base | environ, etc=tmp_path / "etc")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def urls(places: tuple[Location, ...]) -> list[str]:
    return [place.url for place in places]


def test_nothing_configured_is_the_librarys_default(tmp_path: Path) -> None:
    indexes = read(tmp_path)
    assert urls(indexes.indexes) == [PYPI_SIMPLE_ENDPOINT]
    assert uv_arguments(indexes) == ([], {})


def test_the_default_is_the_first_found_and_extras_add_up(tmp_path: Path) -> None:
    write(
        tmp_path / "home/.config/uv/uv.toml",
        """
        find-links = ["wheels"]
        [[index]]
        name = "inner"
        url = "https://inner.example/simple"
        [[index]]
        url = "https://default.example/simple"
        default = true
        [[index]]
        url = "https://explicit.example/simple"
        explicit = true
        [pip]
        extra-index-url = ["https://uv-extra.example/simple"]
        """,
    )
    write(
        tmp_path / "etc/pip.conf",
        "[global]\nindex-url = https://pip.example/simple\n"
        "extra-index-url =\n  https://one.example/simple\n  file:///srv/two\n",
    )
    indexes = read(tmp_path)
    assert urls(indexes.indexes) == [
        "https://default.example/simple",
        "https://uv-extra.example/simple",
        "https://inner.example/simple",
        "https://one.example/simple",
        "file:///srv/two",
    ]
    assert urls(indexes.find_links) == [(tmp_path / "home/.config/uv/wheels").as_uri()]
    over = read(tmp_path, UV_INDEX_URL="https://uv.example/simple")
    assert over.indexes[0].url == "https://uv.example/simple"
    own = read(tmp_path, DRYDOCK_INDEX_URL="https://own.example/s", UV_DEFAULT_INDEX="https://uv.example/s")
    assert own.indexes[0].url == "https://own.example/s"


def test_pips_own_rule_holds_within_pip(tmp_path: Path) -> None:
    write(tmp_path / "etc/pip.conf", "[global]\nindex_url = https://etc.example/s\nfind-links = /etc-links\n")
    user = write(tmp_path / "home/.config/pip/pip.conf", "[global]\nindex-url = https://user.example/s\n")
    write(
        tmp_path / "venv/pip.conf", "[install]\nfind-links = /site-links\n[list]\nindex-url = https://no/s\n"
    )
    indexes = read(tmp_path)
    assert urls(indexes.indexes) == ["https://user.example/s"]
    assert [str(place) for place in indexes.find_links] == ["/site-links"]
    named = write(tmp_path / "named.conf", "[global]\nindex-url = https://named.example/s\n")
    user.write_text("[global]\nextra-index-url = https://user.example/s\n")  # not read beside a named file
    assert urls(read(tmp_path, PIP_CONFIG_FILE=str(named)).indexes) == ["https://named.example/s"]
    assert urls(read(tmp_path, PIP_CONFIG_FILE=os.devnull).indexes) == [PYPI_SIMPLE_ENDPOINT]
    user.unlink()
    by_variable = read(tmp_path, PIP_INDEX_URL="https://var.example/s", PIP_FIND_LINKS="/a /b")
    assert urls(by_variable.indexes) == ["https://var.example/s"]
    assert [str(place) for place in by_variable.find_links] == ["/a", "/b"]


def test_the_pip_of_this_python_reads_the_same(tmp_path: Path) -> None:
    """Ask pip itself about the same files."""
    write(tmp_path / "home/.config/pip/pip.conf", "[global]\nindex-url = https://user.example/s\n")
    write(tmp_path / "home/.pip/pip.conf", "[global]\nindex-url = https://legacy.example/s\n")
    environ = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        env=environ,
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        pytest.skip(f"no pip in this Python: {asked.stderr.strip()}")
    assert [asked.stdout.strip()] == urls(read(tmp_path).indexes)


def test_no_index_closes_its_own_tool_and_those_after(tmp_path: Path) -> None:
    indexes = read(tmp_path, PIP_NO_INDEX="1", PIP_INDEX_URL="https://pip.example/s", PIP_FIND_LINKS="/a")
    assert indexes.indexes == ()
    assert urls(indexes.find_links) == ["file:///a"]
    assert uv_arguments(indexes)[0] == ["--no-index"]
    indexes = read(tmp_path, PIP_NO_INDEX="1", UV_INDEX="https://uv.example/s")
    assert urls(indexes.indexes) == ["https://uv.example/s"]
    assert uv_arguments(indexes)[1]["UV_DEFAULT_INDEX"] == "https://uv.example/s"


def test_uv_lists_names_and_offline(tmp_path: Path) -> None:
    indexes = read(
        tmp_path,
        UV_INDEX="mine=https://a.example/s https://b.example/s",
        UV_EXTRA_INDEX_URL="https://c.example/s",
        UV_FIND_LINKS="/x,https://d.example/links.html",
        UV_INDEX_MINE_USERNAME="ann",
        UV_INDEX_MINE_PASSWORD="pa/ss",
        UV_OFFLINE="true",
    )
    names = [PYPI_SIMPLE_ENDPOINT, "https://a.example/s", "https://b.example/s", "https://c.example/s"]
    assert urls(indexes.indexes) == names
    assert indexes.indexes[1].auth == ("ann", "pa/ss")
    assert urls(indexes.find_links) == ["file:///x", "https://d.example/links.html"]
    assert indexes.offline
    assert indexes.places()[0].url == "file:///x"
    assert uv_arguments(indexes) == ([], {})


def test_uv_config_file_and_no_config(tmp_path: Path) -> None:
    named = write(tmp_path / "n/uv.toml", 'index-url = "https://named.example/s"\noffline = true\n')
    write(tmp_path / "home/.config/uv/uv.toml", 'index-url = "https://user.example/s"\n')
    assert read(tmp_path, UV_CONFIG_FILE=str(named)).indexes[0].url == "https://named.example/s"
    assert read(tmp_path, UV_CONFIG_FILE=str(named)).offline
    assert read(tmp_path, UV_NO_CONFIG="1").indexes[0].tool == "default"


def test_uv_gets_pips_settings_by_environment_only(tmp_path: Path) -> None:
    (tmp_path / "links,1").mkdir()
    indexes = read(
        tmp_path,
        PIP_INDEX_URL="https://ann:pa%2Fss@pip.example/simple",
        PIP_EXTRA_INDEX_URL="https://token@one.example/simple file:///srv/two",
        PIP_FIND_LINKS=f"{tmp_path}/links,1 /not/there",
        UV_INDEX="mine=https://a.example/s",
        UV_INDEX_MINE_PASSWORD="word",
        PIP_CERT="/ca.pem",
    )
    arguments, environment = uv_arguments(indexes)
    assert arguments == []
    assert environment == {
        "UV_DEFAULT_INDEX": "https://ann:pa%2Fss@pip.example/simple",
        "UV_INDEX": "mine=https://:word@a.example/s https://token:@one.example/simple file:///srv/two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": f"{(tmp_path / 'links,1').as_uri().replace(',', '%2C')}",
        "SSL_CERT_FILE": "/ca.pem",
    }
    assert "pa/ss" not in repr(indexes)
    assert "token" not in repr(indexes)
    assert "ann" not in str(indexes.indexes[0])


def test_uv_resolves_from_a_directory_that_only_pip_was_told_of(tmp_path: Path) -> None:
    """The real uv, a wheel made here, no network."""
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "drydock_probe-1.5-py3-none-any.whl", "w") as wheel:
        info = "drydock_probe-1.5.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: drydock-probe\nVersion: 1.5\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    indexes = read(tmp_path, PIP_FIND_LINKS=str(links), PIP_NO_INDEX="1")
    arguments, environment = uv_arguments(indexes)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--no-header", "--offline", *arguments, "-"],
        input="drydock-probe",
        env=clean | environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "drydock-probe==1.5" in done.stdout, done.stderr


def test_netrc_and_where_credentials_go(tmp_path: Path) -> None:
    write(tmp_path / "home/.netrc", "machine n.example login bob password secret\n")
    indexes = read(tmp_path, UV_DEFAULT_INDEX="https://ann:pw@a.example/s")
    place = indexes.indexes[0]
    assert indexes.auth_for("https://a.example/files/x.whl", place) == ("ann", "pw")
    assert indexes.auth_for("https://elsewhere.example/x.whl", place) is None
    assert indexes.auth_for("http://a.example/x.whl", place) is None
    assert indexes.auth_for("https://n.example/x.whl", place) == ("bob", "secret")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("etc/pip.conf", "index-url = https://ann:hunter2@x/s\n"),
        ("home/.config/uv/uv.toml", 'index-url = "https://ann:hunter2@x/s\n'),
    ],
)
def test_a_broken_file_is_one_line_without_its_secrets(tmp_path: Path, path: str, text: str) -> None:
    write(tmp_path / path, text)
    with pytest.raises(DrydockError, match="cannot be read") as caught:
        read(tmp_path)
    assert path in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_of_another_kind_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(DrydockError, match=r"UV_INDEX: .*git\+https") as caught:
        read(tmp_path, UV_INDEX="git+https://ann:hunter2@x/s")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DrydockError, match="PIP_INDEX_URL"):
        read(tmp_path, PIP_INDEX_URL="http://[half/s")


def test_certificates(tmp_path: Path) -> None:
    assert read(tmp_path, SSL_CERT_FILE="/a", REQUESTS_CA_BUNDLE="/b").certificates == (Path("/a"),)
    assert read(tmp_path, REQUESTS_CA_BUNDLE="/b", PIP_CERT="/c").certificates == (Path("/b"),)
    write(tmp_path / "etc/pip.conf", "[global]\ncert = /d\n")
    assert read(tmp_path).certificates == (Path("/d"),)
    with pytest.raises(DrydockError, match="no certificates can be read from /d"):
        read(tmp_path).tls()
    assert Indexes().tls().verify_mode


printable = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/?#[]@:%\\")
words = st.text(printable, min_size=1)


@given(user=words, password=words)
def test_redaction_leaves_no_secret(user: str, password: str) -> None:
    url = f"https://{user}:{password}@host.example:8443/simple/x?token={password}#sha256=1"
    assert redact(url) == "https://host.example:8443/simple/x"


DEB822 = """Types: deb
# a comment in the stanza
URIs: http://mirror.example/debian
Suites: trixie trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security/
Suites: trixie-security
Components: main contrib

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: trixie
Components: main

Types: deb
URIs: https://cloud.example/apt
Suites: cloud-sdk
Components: main
"""

LIST = """
# deb http://commented.example/debian trixie main
deb [arch=amd64 signed-by=/k.gpg] http://old.example/debian bookworm main contrib
deb http://security.example bookworm/updates main
deb https://snapshot.example/archive/debian/20260101T000000Z trixie main
deb http://ubuntu.example/ubuntu noble main
deb http://ubuntu.example/ubuntu noble-security main
deb https://third.example/linux/debian trixie stable
deb https://other.example/product/deb stable main
deb cdrom:[Debian]/ trixie main
deb-src http://src.example/debian trixie main
"""


def test_debian_mirrors_of_apts_sources(tmp_path: Path) -> None:
    write(tmp_path / "sources.list", LIST)
    write(tmp_path / "sources.list.d/debian.sources", DEB822)
    write(tmp_path / "sources.list.d/off.list.disabled", "deb http://off.example/debian trixie main\n")
    assert debian_mirrors({}, apt=tmp_path) == {
        "debian": [
            "http://old.example/debian",
            "https://snapshot.example/archive/debian/20260101T000000Z",
            "http://mirror.example/debian",
        ],
        "debian-security": ["http://security.example", "http://mirror.example/debian-security"],
    }
    (tmp_path / "pool").mkdir()
    own = {"DRYDOCK_DEBIAN_MIRROR": f"https://snap.example/a/debian/20260101T000000Z {tmp_path}/pool"}
    assert debian_mirrors(own, apt=tmp_path)["debian"][:2] == [
        "https://snap.example/a/debian/20260101T000000Z",
        (tmp_path / "pool").as_uri(),
    ]


def test_no_debian_mirror_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DrydockError, match="DRYDOCK_DEBIAN_MIRROR and DRYDOCK_DEBIAN_SECURITY_MIRROR"):
        debian_mirrors({}, apt=tmp_path)
