#!/usr/bin/env bash
# On a machine without network or Docker: put an image together that `tools/carry.py pack` packed, and run its tiers.
#
#   tools/carried.sh PARTS TOOLS OUT ENGINE PROFILE [session options]
#   tools/carried.sh unpack PARTS TOOLS COUNT
#
# PARTS holds part-000 and so on, TOOLS is what `tools/carry.py tools` wrote for this machine's python3.
# Parts of a second image (`pack --after`) are a folder of their own, given in a second call. Documents and logs go to
# OUT, an archive for each kind of session. Run again, it goes on with the image that is there.
#
# The second form, in the background (`setsid ... &`), is for a machine that is sent a part a call: it unpacks COUNT parts as
# they come (moved there, so that each is whole), and the first form waits for it.
set -euo pipefail
count=
if [ "$1" = unpack ]; then count=$4; shift; fi
parts=$1 archive=$2 out=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)
tools=${TMPDIR:-/tmp}/drydock-tools
mkdir -p "$parts"
exec 9> "$parts/.lock"
flock 9
if [ ! -e "$tools/.complete" ]; then
  mkdir -p "$tools"
  tar -xzf "$archive" -C "$tools"
  touch "$tools/.complete"
fi
export PYTHONPATH=$tools:$here/src DRYDOCK_STORE=${DRYDOCK_STORE:-$here/.drydock}
unset PYTHONDONTWRITEBYTECODE
if [ ! -e "$parts/.carried" ]; then
  if [ "$count" ]; then
    coming=() && for number in $(seq -f %03.0f 0 $((count - 1))); do coming+=("$parts/part-$number"); done
    python3 "$here/tools/carry.py" unpack "$DRYDOCK_STORE" "${coming[@]}" --wait 900
  else
    python3 "$here/tools/carry.py" unpack "$DRYDOCK_STORE" "$parts"/part-*
  fi
  touch "$parts/.carried"
fi
exec 9>&-
if [ "$count" ]; then exit; fi
cd "$here"
status=0
python3 -m drydock.session "$@" --prebuilt --runtime chroot || status=$?
mkdir -p "$out"
for latest in results/*/latest; do
  [ -e "$latest/report.json" ] && tar -czf "$out/$(basename "$(dirname "$latest")")-$(basename "$(readlink "$latest")").tar.gz" -C "$latest" .
done
exit "$status"
