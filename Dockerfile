# Reprise in a container, for CPUs; with `--build-arg DEVICE=cuda`, for NVIDIA GPUs. docs/installation.md has the commands.
FROM python:3.11-slim-bookworm AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim-bookworm
ARG DEVICE=cpu
COPY constraints.txt /opt/reprise/
# The default build of torch for Linux is for CUDA. Triton, which comes with it, compiles its launchers with a C compiler.
# hadolint ignore=DL3008
RUN case "$DEVICE" in \
        cpu) pip install --no-cache-dir --no-deps --constraint /opt/reprise/constraints.txt \
            --index-url https://download.pytorch.org/whl/cpu torch ;; \
        cuda) apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
            && rm -rf /var/lib/apt/lists/* ;; \
        *) echo "DEVICE: '$DEVICE' is neither cpu nor cuda" >&2; exit 1 ;; \
    esac
COPY --from=build /wheels /opt/reprise/wheels
RUN pip install --no-cache-dir --constraint /opt/reprise/constraints.txt /opt/reprise/wheels/*.whl \
    && useradd --uid 1000 --create-home reprise \
    && install --directory --owner reprise /work
# A home and a name that every user has whom `docker run --user` may name.
ENV HOME=/tmp USER=reprise
USER 1000
WORKDIR /work
# As Ctrl-C: ranks save a checkpoint first.
STOPSIGNAL SIGINT
ENTRYPOINT ["reprise"]
CMD ["--help"]
