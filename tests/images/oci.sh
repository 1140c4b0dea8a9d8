# shellcheck shell=bash
# This file is sourced, not run. It writes images as an OCI layout. It uses only tar, gzip and jq,
# so that the same input results in the same digests.
#
#   oci_layout DIR                      creates a layout
#   oci_layer DIRECTORY                 adds a layer; prints the LAYER argument for oci_image
#   oci_image TAG CONFIG LAYER…         adds an image; CONFIG is the JSON of the image's `config`

oci_layout() {
    LAYOUT=$1
    mkdir -p "$LAYOUT/blobs/sha256"
    echo '{"imageLayoutVersion":"1.0.0"}' >"$LAYOUT/oci-layout"
    echo '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}' \
        >"$LAYOUT/index.json"
}

# oci_blob FILE MEDIA-TYPE: moves a file to the layout's blobs, and prints its descriptor.
oci_blob() {
    local file=$1 media_type=$2 digest size
    digest=$(sha256sum "$file" | cut -d' ' -f1)
    size=$(stat -c %s "$file")
    mv "$file" "$LAYOUT/blobs/sha256/$digest"
    jq -nc --arg type "$media_type" --arg digest "sha256:$digest" --argjson size "$size" \
        '{mediaType: $type, digest: $digest, size: $size}'
}

oci_layer() {
    local tar=$LAYOUT/layer.tar diff_id descriptor
    tar -C "$1" --sort=name --mtime=@1700000000 --numeric-owner --format=gnu -cf "$tar" .
    diff_id=sha256:$(sha256sum "$tar" | cut -d' ' -f1)
    gzip -n -6 -f "$tar"
    descriptor=$(oci_blob "$tar.gz" application/vnd.oci.image.layer.v1.tar+gzip)
    jq -nc --arg diff_id "$diff_id" --argjson descriptor "$descriptor" '{$diff_id, $descriptor}'
}

oci_image() {
    local tag=$1 config=$2 architecture descriptor
    shift 2
    case $(uname -m) in
        x86_64) architecture=amd64 ;;
        aarch64) architecture=arm64 ;;
        *) architecture=$(uname -m) ;;
    esac
    jq -nc --arg architecture "$architecture" --argjson config "$config" --jsonargs \
        '{created: "2023-11-14T22:13:20Z", $architecture, os: "linux", $config,
          rootfs: {type: "layers", diff_ids: [$ARGS.positional[].diff_id]},
          history: [$ARGS.positional[] | {created: "2023-11-14T22:13:20Z", created_by: "tests/images"}]}' \
        -- "$@" >"$LAYOUT/config.json"
    descriptor=$(oci_blob "$LAYOUT/config.json" application/vnd.oci.image.config.v1+json)
    jq -nc --argjson config "$descriptor" --jsonargs \
        '{schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", $config,
          layers: [$ARGS.positional[].descriptor]}' -- "$@" >"$LAYOUT/manifest.json"
    descriptor=$(oci_blob "$LAYOUT/manifest.json" application/vnd.oci.image.manifest.v1+json)
    jq -c --arg tag "$tag" --argjson descriptor "$descriptor" \
        '.manifests += [$descriptor + {annotations: {"org.opencontainers.image.ref.name": $tag}}]' \
        "$LAYOUT/index.json" >"$LAYOUT/index.new"
    mv "$LAYOUT/index.new" "$LAYOUT/index.json"
}
