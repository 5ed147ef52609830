#!/usr/bin/env bash
# Calls 2, one for each piece: call_2_pieces.sh NAME. Carries PACK/NAME/pieces.sha256 and one or more pieces beside it.
# What has come is unpacked behind the calls, in order; NAME.done says that all of it was. A damaged piece is left
# aside: bring it again.
. "$(dirname "$0")/steps.sh"
name=${1:?tensorrt, onnxruntime or training}
there=$VISIT/$name
mkdir -p "$there/whole"
[ ! -e "$PACK/$name/pieces.sha256" ] || cp "$PACK/$name/pieces.sha256" "$there"
for piece in "$PACK/$name"/piece.*; do
  (cd "$PACK/$name" && grep " $(basename "$piece")\$" pieces.sha256 | sha256sum --check --quiet) || continue
  cp "$piece" "$there/coming" && mv "$there/coming" "$there/$(basename "$piece")"
done
unpack='while read -r _ piece; do until [ -e "$1/$piece" ]; do sleep 0.2; done; cat "$1/$piece"; done <"$1/pieces.sha256" | xz -dc | tar -x -C "$1/whole"'
alive "$VISIT/$name.pid" || [ -e "$VISIT/$name.done" ] || behind "$name" bash -o pipefail -c "$unpack" unpack "$there"
here=$(find "$there" -name 'piece.*' | wc -l) all=$(wc -l <"$there/pieces.sha256")
echo "$name: $here of $all pieces, $(left) s left" | tee -a "$OUT/pieces.txt"
((here < all)) || await 120 "$VISIT/$name.done" "$VISIT/$name.pid"
