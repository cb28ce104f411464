# Sereno with its three examples. `docker build .` needs nothing from this machine but the checkout.
# A site's own pip settings (index, proxy) go in as a secret that leaves no trace in the image:
#   docker build --secret id=pipconf,src=$HOME/.config/pip/pip.conf .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
# The lock holds what tests need, too. So all of it is fetched and its hashes compared, and then
# pip takes from that folder what a server needs, and what the assistant's chat model needs (`llm`).
COPY requirements.lock ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    pip download --quiet --require-hashes --no-deps --dest wheels -r requirements.lock
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["llm"], sep="\n")' > wanted.txt \
    && python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --quiet --no-index --find-links wheels -r wanted.txt
COPY README.md LICENSE otel-collector.yaml otel-collector.sampling.yaml ./
COPY dashboards dashboards
COPY runtime runtime
COPY telemetry telemetry
RUN pip --python /venv/bin/python install --quiet --no-index --find-links wheels --no-deps .

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 sereno \
    && useradd --uid 10001 --gid sereno --no-create-home --home-dir /data --shell /usr/sbin/nologin sereno \
    && install --directory --owner=sereno --group=sereno --mode=0750 /data
COPY --from=build /venv /venv
COPY examples /srv/examples
ARG SERENO_COMMIT=
# The admin listener has no keys and must never be published: only a network of containers sees it.
# The API refuses to listen beyond loopback without keys, until somebody sets SERENO_INSECURE=1.
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    SERENO_ADMIN_HOST=0.0.0.0 \
    SERENO_COMMIT=${SERENO_COMMIT} \
    SERENO_ENGINE=sqlite:////data/sereno.db \
    SERENO_HOST=0.0.0.0
WORKDIR /srv
USER 10001:10001
EXPOSE 8009 9009
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8009/readyz', timeout=2)"]
ENTRYPOINT ["sereno"]
CMD ["serve", "--config=examples/screening/langgraph.json", "--config=examples/research/langgraph.json", "--config=examples/assistant/langgraph.json"]
