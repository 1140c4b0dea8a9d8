#!/usr/bin/env bash
# Builds every test image, or with `demo` only the image that the demo uses, and pushes the images
# to a registry whose directory is kept. tests/images/build.sh runs this script in the native view.
# /out contains busybox/, nnp and pause. This script adds registry/ and archives/.
set -euo pipefail
HERE=$(dirname -- "$(readlink -f -- "$0")")
. "$HERE/oci.sh"
. "$HERE/../setup/cache.sh"

tree=$(mktemp -d)
oci_layout "$tree/layout"
mkdir -p /out/registry /out/archives
skopeo() { command skopeo --insecure-policy "$@"; }

# Pushes all images to a real registry. The tests use the files that the registry stores.
push() {
    local name
    local -a names=()
    mapfile -t names < <(jq -r '.manifests[].annotations["org.opencontainers.image.ref.name"]' "$tree/layout/index.json")
    REGISTRY_DATA=/out/registry "$HERE/registry.sh" start
    for name in "${names[@]}"; do
        skopeo copy --quiet --dest-tls-verify=false --preserve-digests "oci:$tree/layout:$name" \
            "docker://127.0.0.1:5000/$name" </dev/null
        echo "pushed $name"
    done | progress "pushing the test images" "${#names[@]}" '^pushed' images
    "$HERE/registry.sh" stop
}

# The lowest layer of every image: busybox, and the files that a small distribution has.
base=$tree/base
mkdir -p "$base"/{dev,proc,sys,etc,home,root,run,var/{run,log,www,spool/mail}} "$base/tmp"
cp -a /out/busybox/. "$base/"
chmod 700 "$base/root"
chmod 1777 "$base/tmp"
cat >"$base/etc/passwd" <<'END'
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
END
cat >"$base/etc/group" <<'END'
root:x:0:
daemon:x:1:
bin:x:2:
www-data:x:33:
nogroup:x:65534:
END
base=$(oci_layer "$base")

path='"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]'
busybox="{$path,\"Cmd\":[\"sh\"]}"

oci_image demo/busybox:latest "$busybox" "$base"
if [[ ${1-} == demo ]]; then
    push
    rm -rf "$tree"
    exit
fi

# file NAME MODE: writes a layer whose only file contains the standard input, and prints the layer.
file() {
    local dir
    dir=$(mktemp -d "$tree/file.XXXX")
    # The layer's top directory becomes the container's root, which all users must be able to enter.
    chmod 755 "$dir"
    mkdir -p "$dir/$(dirname "$1")"
    cat >"$dir/$1"
    chmod "$2" "$dir/$1"
    oci_layer "$dir"
}

# incompressible SEED MEGABYTES: prints random bytes, which are the same for the same seed.
incompressible() {
    openssl enc -aes-128-ctr -nosalt -pbkdf2 -pass "pass:$1" -in /dev/zero 2>/dev/null |
        head -c "$2M" || true
}

# The demonstration image: a web server on port 5000 in seven layers. Three layers are so large that
# the effect of a parallel pull is visible.
page=$(echo 'hello from rrun' | file www/index.html 644)
health=$(echo ok | file www/healthz 644)
bulk=()
for seed in one two three; do
    bulk+=("$(incompressible "$seed" 2 | file "www/bulk-$seed" 644)")
done
# As process 1, httpd would ignore SIGTERM, and every stop would take its whole grace period.
server=$(file usr/bin/web 755 <<'END'
#!/bin/sh
httpd -f -vv -p "${PORT:-5000}" -h /www &
trap 'kill $!; exit 0' TERM INT
echo "serving /www on port ${PORT:-5000}"
wait
END
)
oci_image demo/web:1 "{$path,\"Cmd\":[\"web\"],\"WorkingDir\":\"/www\",
    \"ExposedPorts\":{\"5000/tcp\":{}}}" "$base" "$server" "$page" "$health" "${bulk[@]}"
oci_image library/busybox:latest "$busybox" "$base"

# The application that kubelet's tests run, in two versions: a Flask service on port 5000.
flask_base=$(oci_layer /out/flask/base)
flask_install=$(oci_layer /out/flask/install)
flask_app=$(file srv/app.py 644 <"$HERE/app.py")
for version in 1 2; do
    oci_image "demo/flask:$version" "{\"Env\":[\"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\",
        \"APP_VERSION=$version\",\"PYTHONUNBUFFERED=1\"],\"Cmd\":[\"python3\",\"/srv/app.py\"],
        \"WorkingDir\":\"/srv\",\"User\":\"www-data\",\"ExposedPorts\":{\"5000/tcp\":{}}}" \
        "$flask_base" "$flask_install" "$flask_app"
done

# critest's images. critest expects a web server whose program is called `nginx`, with its process
# ID in a file and "master process" in its command line. The server must exit on SIGTERM.
web_server() {
    local port=$1
    file usr/sbin/nginx 755 <<END
#!/bin/sh
echo \$\$ >/var/run/nginx.pid
httpd -f -p $port -h /www &
trap 'kill \$!; exit 0' TERM INT QUIT
wait
END
}
nginx="{$path,\"Cmd\":[\"/usr/sbin/nginx\",\"master process\"]}"
oci_image e2e-test-images/busybox:1.29-2 "$busybox" "$base"
oci_image e2e-test-images/nginx:1.14-2 "$nginx" "$base" "$page" "$(web_server 80)"
oci_image k8s-staging-cri-tools/hostnet-nginx-amd64:latest "$nginx" "$base" "$page" "$(web_server 12003)"
oci_image k8s-staging-cri-tools/hostnet-nginx-arm64:latest "$nginx" "$base" "$page" "$(web_server 12003)"
starter=$(file usr/sbin/start-httpd 755 <<'END'
#!/bin/sh
echo "httpd: resuming normal operations"
exec httpd -f -p 80 -h /www
END
)
oci_image e2e-test-images/httpd:2.4.39-4 "{$path,\"Cmd\":[\"/usr/sbin/start-httpd\"]}" \
    "$base" "$page" "$starter"
oci_image e2e-test-images/nonewprivs:1.3 "{$path,\"Cmd\":[\"/nnp\"]}" "$base" "$(file nnp 4755 </out/nnp)"

# Each of these images has a separate layer, so that no two of them have the same digest.
for name in test-image-1:latest test-image-2:latest test-image-3:latest test-image-latest:latest \
    test-image-tag:test test-image-tag:all; do
    oci_image "k8s-staging-cri-tools/$name" "$busybox" "$base" "$(echo "$name" | file etc/image 644)"
done
tags=$(echo test-image-tags | file etc/image 644)
for tag in 1 2 3; do
    oci_image "k8s-staging-cri-tools/test-image-tags:$tag" "$busybox" "$base" "$tags"
done
while read -r name user; do
    oci_image "k8s-staging-cri-tools/$name:latest" "{$path,\"Cmd\":[\"sh\"],\"User\":\"$user\"}" "$base" \
        "$(echo "$name" | file etc/image 644)"
done <<'END'
test-image-user-uid 1002
test-image-user-username www-data
test-image-user-uid-group 1003:100
test-image-user-username-group www-data:100
END
accounts=$tree/accounts
mkdir -p "$accounts/etc"
tar -xzOf "$tree/layout/blobs/sha256/$(jq -r '.descriptor.digest[7:]' <<<"$base")" ./etc/passwd >"$accounts/etc/passwd"
tar -xzOf "$tree/layout/blobs/sha256/$(jq -r '.descriptor.digest[7:]' <<<"$base")" ./etc/group >"$accounts/etc/group"
echo 'default-user:x:1000:1000::/home/default-user:/bin/sh' >>"$accounts/etc/passwd"
printf 'default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n' >>"$accounts/etc/group"
oci_image k8s-staging-cri-tools/test-image-predefined-group:latest \
    "{$path,\"Cmd\":[\"sh\"],\"User\":\"1000\"}" "$base" "$(oci_layer "$accounts")"
oci_image pause:3.9 "{$path,\"Entrypoint\":[\"/pause\"]}" "$(file pause 755 </out/pause)"

push
skopeo copy --quiet "oci:$tree/layout:demo/web:1" oci-archive:/out/archives/demo-web.oci.tar:localhost/demo/web:1
skopeo copy --quiet "oci:$tree/layout:demo/busybox:latest" \
    docker-archive:/out/archives/demo-busybox.docker.tar:localhost/demo/busybox:latest
rm -rf "$tree"
