"""`drydock sbom` and `drydock rebuild`: what an image is made of, and whether that is so."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

supply = typer.Typer()

Name = Annotated[str, typer.Argument(metavar="IMAGE", help="an image, as `drydock images` lists them")]


@supply.command()
def sbom(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="write it there, not to standard output")
    ] = None,
) -> None:
    """What a built image is made of, as CycloneDX: wheels, debs and base, with hashes and licences."""
    from drydock.definition import Image
    from drydock.oci import read_image
    from drydock.project import open_store, project_root
    from drydock.sbom import sbom as make
    from drydock.store import disk_errors

    root = project_root()
    store = open_store(root)
    image = Image.named(root, name)
    made = make(image, read_image(store, image.name, whole=False), store)
    if output is None:
        sys.stdout.buffer.write(made.data)
        return
    with disk_errors(output.parent):
        output.write_bytes(made.data)
    print(f"{output}: {made.components} components, {made.licensed} of them with a licence")


@supply.command()
def rebuild(
    reference: Annotated[
        str, typer.Argument(metavar="IMAGE@sha256:DIGEST", help="a published image, by its manifest's digest")
    ],
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry", metavar="HOST[:PORT][/PATH]", help="what DRYDOCK_REGISTRY says by default"
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="layers made at a time")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Build a published image again, from the locks that it carries: is it bit for bit the same?"""
    from dataclasses import asdict

    from drydock.errors import CheckFailed, DrydockError
    from drydock.project import get_artifacts, open_store, project_root
    from drydock.publish import VARIABLE, Source, registries
    from drydock.rebuild import rebuild as make

    found = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)@sha256:([0-9a-f]{64})", reference)
    if not found:
        raise DrydockError(
            f"{reference!r} names no published image: write IMAGE@sha256: and the 64 digits of its digest"
        )
    name, digest = found.groups()
    root = project_root()
    store = open_store(root)
    # It may be in the store; then nobody is asked.
    places = registries(os.environ, registry) if registry or os.environ.get(VARIABLE) else []
    source = Source(
        repository=name, places=places, remedy=f"name who has it with --registry, or set {VARIABLE} to it"
    )
    made = make(
        root, store, source, digest, os.environ, lambda artifacts: get_artifacts(store, artifacts), jobs=jobs
    )
    count = sum(1 for layer in made.made.layers if layer.made)
    if as_json:
        document = {
            "image": name,
            "published": f"sha256:{digest}",
            "made": f"sha256:{made.made.digest}",
            "same": made.same,
            "layers": count,
            "differences": [asdict(each) for each in made.differences],
            "seconds": round(made.seconds, 3),
        }
        print(json.dumps(document), flush=True)
    elif made.same:
        print(f"{reference}: bit for bit the same, {count} layers made again in {made.seconds:.1f} s")
    else:
        for each in made.differences:
            how = "" if each.content else " (the same files, compressed otherwise)"
            print(
                f"{each.title}: published {each.published or 'not at all'}, made {each.made or 'not at all'}{how}"
            )
    if not made.same:
        what = (
            f"{len(made.differences)} of {count} layers differ"
            if made.differences
            else "the layers are the same, their order or the config is not"
        )
        raise CheckFailed(
            f"{reference} is not what its locks give here, sha256:{made.made.digest}: {what}; an image does not say "
            "which drydock made it, so try the one of its time"
        )
