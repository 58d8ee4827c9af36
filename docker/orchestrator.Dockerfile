# Prefect server, MLflow server, `alignflow deploy` and CPU worker, by command; nothing that trains.
#
#   docker build --file docker/orchestrator.Dockerfile --tag alignflow-orchestrator:0.1.0 .
#
# To pin the bytes as well as the version, write the digest after the tag: FROM python:3.12.13-slim-bookworm@sha256:...
# `docker buildx imagetools inspect python:3.12.13-slim-bookworm` prints it.

# 3.12, because the GPU worker's base ships it: one Python wherever a flow runs
FROM python:3.12.13-slim-bookworm AS base

# The names of the libraries alone, so that the layer below that installs them stays while nothing else in pyproject.toml changes but them. The package
# itself cannot be installed for that: it is not built without all the files that pyproject.toml names.
FROM base AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; \
        print(*project['dependencies'], *extras['server'], sep='\n')" > requirements.txt

FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/alignflow/bin:$PATH
RUN python -m venv /opt/alignflow
WORKDIR /src
# the libraries before alignflow's own code: their layer stays while only that changes
COPY --from=requirements /src/requirements.txt ./
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY deployments deployments
COPY flows flows
COPY tasks tasks
RUN pip install --constraint constraints.txt --no-deps .

FROM base
# flows.services.environment.FIXED, for what does not start through alignflow: the two servers, and runs that a docker or kubernetes pool starts
ENV DO_NOT_TRACK=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT=true \
    PREFECT_CLI_COLORS=false \
    PREFECT_RESULTS_DEFAULT_SERIALIZER=json \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=120 \
    PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS=5 \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
    PREFECT_SERVER_UI_V2_ENABLED=false \
    PREFECT_WORKER_QUERY_SECONDS=1
ENV ALIGNFLOW_HOME=/var/lib/alignflow \
    PATH=/opt/alignflow/bin:$PATH \
    PREFECT_HOME=/var/lib/alignflow/prefect \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# new volumes take their owner from the folder in the image
RUN groupadd --gid 10001 alignflow \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/lib/alignflow --shell /usr/sbin/nologin alignflow \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/alignflow /var/lib/mlartifacts
COPY --from=build /opt/alignflow /opt/alignflow
WORKDIR /var/lib/alignflow
VOLUME /var/lib/alignflow
USER 10001:10001
CMD ["alignflow", "--help"]
