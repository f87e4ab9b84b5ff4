#!/usr/bin/env bash
# On a machine without network or Docker: put an image together that `tools/carry.py pack` packed, and run its tiers.
#
#   tools/carried.sh PARTS TOOLS OUT ENGINE PROFILE [session options]
#
# PARTS holds part-000 and so on, TOOLS is what `tools/carry.py tools` wrote for this machine's python3.
# Parts of a second image (`pack --after`) are a folder of their own, given in a second call. Documents and logs go to
# OUT, an archive for each kind of session. Run again, it goes on with the image that is there.
set -euo pipefail
parts=$1 archive=$2 out=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)
tools=${TMPDIR:-/tmp}/drydock-tools
if [ ! -e "$tools/.complete" ]; then
  mkdir -p "$tools"
  tar -xzf "$archive" -C "$tools"
  touch "$tools/.complete"
fi
export PYTHONPATH=$tools:$here/src DRYDOCK_STORE=${DRYDOCK_STORE:-$here/.drydock}
unset PYTHONDONTWRITEBYTECODE
if [ ! -e "$parts/.carried" ]; then
  python3 "$here/tools/carry.py" unpack "$DRYDOCK_STORE" "$parts"/part-*
  touch "$parts/.carried"
fi
cd "$here"
status=0
python3 -m drydock.session "$@" --prebuilt --runtime chroot || status=$?
mkdir -p "$out"
for latest in results/*/latest; do
  [ -e "$latest/report.json" ] && tar -czf "$out/$(basename "$(dirname "$latest")")-$(basename "$(readlink "$latest")").tar.gz" -C "$latest" .
done
exit "$status"
