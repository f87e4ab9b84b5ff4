"""`drydock sbom`: what an image is made of."""

from __future__ import annotations

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
