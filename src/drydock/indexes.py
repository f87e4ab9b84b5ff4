"""Where artifacts may come from: the user's own index, find-links and Debian mirror configuration.

Nothing here names a registry. Settings count in this order of authority: drydock's variable, uv's variables
and `uv.toml`, pip's variables and configuration files, the default built into pypi-simple. One rule merges
them: the default index is the first one found; extra indexes and find-links of all tools are added up; a
tool's "no index" takes away the indexes of that tool and of those after it. Within a tool its own rules hold
(pip: the more particular setting replaces the other; uv: lists are added up).
"""

from __future__ import annotations

import configparser
import netrc
import os
import re
import ssl
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx
from debian.deb822 import Deb822
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from drydock.errors import DrydockError

Tool = Literal["drydock", "uv", "pip", "default"]
Auth = tuple[str, str]

CODENAMES = (
    *("bullseye", "bookworm", "trixie", "forky", "duke", "sid"),
    *("oldstable", "stable", "testing", "unstable"),
)
"""Debian's own suites; a stanza of apt's sources counts only if it is for one of them."""

MIRROR_VARIABLES = {"debian": "DRYDOCK_DEBIAN_MIRROR", "debian-security": "DRYDOCK_DEBIAN_SECURITY_MIRROR"}
"""Archive name in a lock -> the variable that lists its base addresses, separated by spaces."""


def redact(url: str) -> str:
    """An address fit for a message: without userinfo, query and fragment, where secrets travel."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def file_path(url: str) -> Path | None:
    """The local path of a `file:` address, or None for any other."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


@dataclass(frozen=True, kw_only=True)
class Location:
    """One index or find-links place. `url` (http, https or file) holds no credentials and may be printed.

    `setting` is the variable or file that named it, `name` is uv's name for an index, if it has one.
    """

    url: str
    tool: Tool
    setting: str
    name: str = ""
    auth: Auth | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.path or redact(self.url))

    @property
    def path(self) -> Path | None:
        """The directory or page on disk, or None when it is behind a network."""
        return file_path(self.url)

    def with_credentials(self) -> str:
        """The address with its userinfo, as another program's environment needs it; never print it."""
        if self.auth is None:
            return self.url
        parts = urlsplit(self.url)
        user, password = (quote(part, safe="") for part in self.auth)
        return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc}"))


@dataclass(frozen=True, kw_only=True)
class Indexes:
    """What the user's configuration says about indexes; `read_indexes` makes it.

    `indexes` are simple repositories, the default one first; `find_links` are flat places.
    """

    indexes: tuple[Location, ...] = ()
    find_links: tuple[Location, ...] = ()
    offline: bool = False
    certificates: tuple[Path, ...] = ()
    index_strategy: str = ""
    netrc: Path | None = None

    def places(self) -> list[Location]:
        """Every place in the order to ask: what is on disk first, then find-links, then indexes."""
        both = [*self.find_links, *self.indexes]
        return sorted(both, key=lambda place: place.path is None)

    def auth_for(self, url: str, place: Location | None = None) -> Auth | None:
        """User and password for an address: those of the place if it is on its host, else netrc's.

        The place's are never sent to another host, where an index may keep its files.
        """
        parts = urlsplit(url)
        if place and place.auth:
            home = urlsplit(place.url)
            if (home.scheme, home.netloc) == (parts.scheme, parts.netloc.rpartition("@")[2]):
                return place.auth
        if self.netrc is None or "@" in parts.netloc:
            return None
        try:
            found = netrc.netrc(self.netrc).authenticators(parts.hostname or "")
        except (OSError, netrc.NetrcParseError):
            return None
        return (found[0], found[2] or "") if found else None

    def tls(self) -> ssl.SSLContext:
        """Trust the configured certificates, or else the machine's and certifi's.

        Raises:
            DrydockError: a configured file or directory is missing or holds no certificate.
        """
        if not self.certificates:
            context = httpx.create_ssl_context(trust_env=False)
            context.load_default_certs()
            return context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for path in self.certificates:
            try:
                if path.is_dir():
                    context.load_verify_locations(capath=path)
                else:
                    context.load_verify_locations(cafile=path)
            except (OSError, ssl.SSLError) as error:
                raise DrydockError(
                    f"no certificates can be read from {path}: set SSL_CERT_FILE to a PEM file that has them"
                ) from error
        return context


def read_indexes(environ: Mapping[str, str], *, etc: Path = Path("/etc")) -> Indexes:
    """Read the user's configuration of indexes.

    Parameters:
        environ: usually `os.environ`.
        etc: the folder of the machine-wide configuration.

    Raises:
        DrydockError: a configuration file cannot be parsed, or an address is of a kind drydock cannot read.
    """
    home = Path(environ.get("HOME") or Path.home())
    tools = [_drydock_settings(environ), _uv_settings(environ, home, etc), _pip_settings(environ, home, etc)]
    default: list[Location] = []
    extra: list[Location] = []
    closed = False
    for tool in tools:
        closed = closed or tool.no_index
        if not closed:
            default += tool.default
            extra += tool.extra
    if not default and not closed:
        default = [Location(url=PYPI_SIMPLE_ENDPOINT, tool="default", setting="pypi-simple's default")]
    netrc_file = Path(environ.get("NETRC") or home / ".netrc")
    return Indexes(
        indexes=_distinct([*default[:1], *extra]),
        find_links=_distinct(place for tool in tools for place in tool.find_links),
        offline=any(tool.offline for tool in tools),
        certificates=_certificates(environ, tools[-1]),
        index_strategy=tools[1].index_strategy,
        netrc=netrc_file if netrc_file.is_file() else None,
    )


def _certificates(environ: Mapping[str, str], pip: _Settings) -> tuple[Path, ...]:
    own = [environ[key] for key in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(key)]
    others = [text for text in (environ.get("REQUESTS_CA_BUNDLE"), pip.certificate) if text]
    return tuple(Path(text) for text in own or others[:1])


def _distinct(places: Iterable[Location]) -> tuple[Location, ...]:
    return tuple({place.url.rstrip("/"): place for place in reversed(list(places))}.values())[::-1]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What one tool's configuration says; `default` has the candidates, the most particular first."""

    default: tuple[Location, ...] = ()
    extra: tuple[Location, ...] = ()
    find_links: tuple[Location, ...] = ()
    no_index: bool = False
    offline: bool = False
    certificate: str = ""
    index_strategy: str = ""


def _drydock_settings(environ: Mapping[str, str]) -> _Settings:
    name = "DRYDOCK_INDEX_URL"
    return _Settings(default=_locations(environ.get(name, "").split(), "drydock", name))


def _truth(text: str | None) -> bool:
    return (text or "").strip().lower() in ("1", "t", "true", "y", "yes", "on")


def _locations(
    texts: Iterable[str], tool: Tool, setting: str, folder: Path | None = None
) -> tuple[Location, ...]:
    return tuple(_location(text, tool, setting, folder or Path.cwd()) for text in texts if text)


def _location(text: str, tool: Tool, setting: str, folder: Path) -> Location:
    name = ""
    if named := re.match(r"([A-Za-z0-9._-]+)=(.+)", text):
        name, text = named.groups()
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise DrydockError(f"{setting}: an address in it cannot be parsed: mend it") from error
    auth = None
    if parts.scheme in ("http", "https") and parts.hostname:
        userinfo, _, netloc = parts.netloc.rpartition("@")
        if userinfo:
            user, _, password = userinfo.partition(":")
            auth = (unquote(user), unquote(password))
        text = urlunsplit(parts._replace(netloc=netloc))
    elif not parts.scheme:
        text = (folder / Path(text).expanduser()).resolve().as_uri()
    elif parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise DrydockError(
            f"{setting}: an address that starts with {parts.scheme}: is none that drydock can read: "
            "give http(s)://, file:// or a directory"
        )
    return Location(url=text, tool=tool, setting=setting, name=name, auth=auth)


# uv


def _uv_settings(environ: Mapping[str, str], home: Path, etc: Path) -> _Settings:
    def of(variable: str, separator: str | None = None) -> tuple[Location, ...]:
        texts = (text.strip() for text in environ.get(variable, "").split(separator))
        return _locations(texts, "uv", variable)

    files = [] if _truth(environ.get("UV_NO_CONFIG")) else list(_uv_files(environ, home, etc))
    default = [*of("UV_DEFAULT_INDEX"), *of("UV_INDEX_URL")]
    extra = [*of("UV_INDEX"), *of("UV_EXTRA_INDEX_URL")]
    find_links = [*of("UV_FIND_LINKS", ",")]
    tables: list[dict[str, Any]] = []
    for path in files:
        data = _read_toml(path)
        for table in (data.get("pip", {}), data):
            tables.append(table)
            settings = _uv_table(table, path)
            default += settings.default
            extra += settings.extra
            find_links += settings.find_links
    return _Settings(
        default=tuple(_named_credentials(place, environ) for place in default),
        extra=tuple(_named_credentials(place, environ) for place in extra),
        find_links=tuple(find_links),
        no_index=any(table.get("no-index") is True for table in tables),
        offline=_truth(environ.get("UV_OFFLINE")) or any(table.get("offline") is True for table in tables),
        index_strategy=environ.get("UV_INDEX_STRATEGY", "")
        or next((str(table["index-strategy"]) for table in tables if table.get("index-strategy")), ""),
    )


def _uv_files(environ: Mapping[str, str], home: Path, etc: Path) -> Iterator[Path]:
    if named := environ.get("UV_CONFIG_FILE"):
        yield Path(named)
        return
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml"
    if user.is_file():
        yield user
    folders = environ.get("XDG_CONFIG_DIRS") or str(etc / "xdg")
    for path in (*(Path(folder) / "uv" / "uv.toml" for folder in folders.split(":")), etc / "uv" / "uv.toml"):
        if path.is_file():
            yield path
            return


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DrydockError(
            f"uv's configuration {path} cannot be read ({type(error).__name__}): mend it"
        ) from error


def _uv_table(table: dict[str, Any], path: Path) -> _Settings:
    def of(key: str) -> tuple[Location, ...]:
        value = table.get(key) or []
        texts = value if isinstance(value, list) else [value]
        return _locations((str(text) for text in texts), "uv", str(path), path.parent)

    default: list[Location] = []
    extra: list[Location] = []
    for entry in table.get("index", []):
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise DrydockError(f"{path}: index: an entry has no url")
        if entry.get("explicit"):
            continue  # uv asks it only for packages that are pinned to it, which a lock knows nothing of
        place = _location(entry["url"], "uv", str(path), path.parent)
        place = replace(place, name=str(entry.get("name", "")))
        if entry.get("format") == "flat":
            extra.append(place)  # a directory or page without folders; looked up as any place is
        else:
            (default if entry.get("default") else extra).append(place)
    return _Settings(
        default=(*default, *of("index-url")),
        extra=(*extra, *of("extra-index-url")),
        find_links=of("find-links"),
    )


def _named_credentials(place: Location, environ: Mapping[str, str]) -> Location:
    if not place.name:
        return place
    stem = f"UV_INDEX_{re.sub(r'[^A-Z0-9]', '_', place.name.upper())}"
    user, password = environ.get(f"{stem}_USERNAME"), environ.get(f"{stem}_PASSWORD")
    if user is None and password is None:
        return place
    return replace(place, auth=(user or "", password or ""))


# pip


def _pip_settings(environ: Mapping[str, str], home: Path, etc: Path) -> _Settings:
    values: dict[str, tuple[str, str]] = {}
    for path in _pip_files(environ, home, etc):
        values.update({key: (value, str(path)) for key, value in _read_pip_file(path).items()})
    for variable, value in environ.items():
        # A variable set to nothing is no setting, to pip too.
        if variable.startswith("PIP_") and value:
            values[variable.removeprefix("PIP_").lower().replace("_", "-")] = (value, variable)

    def of(key: str) -> tuple[Location, ...]:
        value, setting = values.get(key, ("", ""))
        return _locations(value.split(), "pip", setting)

    return _Settings(
        default=of("index-url"),
        extra=of("extra-index-url"),
        find_links=of("find-links"),
        no_index=_truth(values.get("no-index", ("", ""))[0]),
        certificate=values.get("cert", ("", ""))[0],
    )


def _pip_files(environ: Mapping[str, str], home: Path, etc: Path) -> list[Path]:
    """pip's configuration files, the least particular first, as `pip config debug` lists them."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    folders = environ.get("XDG_CONFIG_DIRS") or str(etc / "xdg")
    paths = [Path(folder) / "pip" / "pip.conf" for folder in folders.split(":")]
    paths += [etc / "pip.conf"]
    if not (named and Path(named).exists()):
        user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
        paths += [home / ".pip" / "pip.conf", user / "pip" / "pip.conf"]
    paths += [Path(environ.get("VIRTUAL_ENV") or sys.prefix) / "pip.conf"]
    if named:
        paths.append(Path(named))
    return [path for path in paths if path.is_file()]


def _read_pip_file(path: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # The error's own text quotes lines of the file, which may hold a password.
        raise DrydockError(
            f"pip's configuration {path} cannot be read ({type(error).__name__}): mend it"
        ) from error
    found: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            found.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    return found


def uv_arguments(indexes: Indexes) -> tuple[list[str], dict[str, str]]:
    """What to add to a uv command and to its environment so that it resolves from the same indexes.

    uv reads its own configuration, so only what drydock's or pip's settings say is passed on. Addresses go
    by the environment, since they may hold credentials and every user of a machine can read a command line.
    """
    arguments: list[str] = []
    environment: dict[str, str] = {}

    def own(places: Iterable[Location], variable: str) -> list[Location]:
        chosen = [place for place in places if place.setting == variable or place.tool in ("drydock", "pip")]
        return chosen if any(place.tool != "uv" for place in chosen) else []

    def named(place: Location) -> str:
        return f"{place.name}={place.with_credentials()}" if place.name else place.with_credentials()

    if indexes.indexes:
        default, *extra = indexes.indexes
        if default.tool != "default":
            environment["UV_DEFAULT_INDEX"] = named(default)
        if passed := own(extra, "UV_INDEX"):
            environment["UV_INDEX"] = " ".join(named(place) for place in passed)
            if not indexes.index_strategy:
                # pip's users expect the best version of all indexes, not the first index that has any.
                environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    else:
        arguments.append("--no-index")
    links = [place for place in indexes.find_links if place.path is None or place.path.exists()]
    if passed := own(links, "UV_FIND_LINKS"):
        addresses = [place.with_credentials().replace(",", "%2C") for place in passed]
        environment["UV_FIND_LINKS"] = ",".join(addresses)
    for path in indexes.certificates:
        environment["SSL_CERT_DIR" if path.is_dir() else "SSL_CERT_FILE"] = str(path)
    return arguments, environment


# Debian


def debian_mirrors(environ: Mapping[str, str], *, apt: Path = Path("/etc/apt")) -> dict[str, list[str]]:
    """Base addresses of the archives `debian` and `debian-security`: from variables, then apt's sources.

    Raises:
        DrydockError: neither says where a Debian archive is.
    """
    found: dict[str, list[str]] = {archive: [] for archive in MIRROR_VARIABLES}
    for archive, variable in MIRROR_VARIABLES.items():
        for text in environ.get(variable, "").split():
            found[archive].append(_location(text, "drydock", variable, Path.cwd()).with_credentials())
    for uri, suites, components in _apt_sources(apt):
        mirror = _recognise(uri, suites, components)
        if mirror:
            found[mirror].append(uri)
    if not any(found.values()):
        raise DrydockError(
            "no Debian mirror is known: this machine's apt sources name none; set "
            f"{' and '.join(MIRROR_VARIABLES.values())} to the base of a mirror or snapshot archive, or to a "
            "directory"
        )
    return {
        archive: list(dict.fromkeys(uri.rstrip("/") for uri in uris))
        for archive, uris in found.items()
        if uris
    }


def _apt_sources(apt: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each source's address, suites and components."""
    lists = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    for path in lists:
        if not path.is_file():
            continue
        for line in path.read_text(errors="replace").splitlines():
            words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
            if len(words) >= 3 and words[0] == "deb":
                yield words[1], [words[2]], words[3:]
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        with path.open(errors="replace") as file:
            for stanza in Deb822.iter_paragraphs(file, use_apt_pkg=False):
                enabled = str(stanza.get("Enabled", "yes")).lower() not in ("no", "false", "0", "off")
                if enabled and "deb" in stanza.get("Types", "").split():
                    for uri in stanza.get("URIs", "").split():
                        yield uri, stanza.get("Suites", "").split(), stanza.get("Components", "").split()


def _recognise(uri: str, suites: list[str], components: list[str]) -> str | None:
    """Which archive of Debian a source is, or None for another distribution's or a third party's."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https", "file") or "main" not in components or not suites:
        return None
    names = [re.sub(r"(-updates|-security|-backports|/updates)$", "", suite) for suite in suites]
    if not set(names) <= set(CODENAMES):
        return None
    security = all(re.search(r"(-security|/updates)$", suite) for suite in suites)
    # A snapshot archive has a timestamp below the archive's name.
    last = re.sub(r"/\d{8}T\d{6}Z$", "", parts.path.rstrip("/")).rpartition("/")[2]
    if security:
        return "debian-security" if last in ("", "debian-security") else None
    return "debian" if last == "debian" else None
