"""The statistics of all disks for Prometheus; needs the extra `metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from virtio.errors import RequestError, TransportError
from virtio_bdev.bdev import Bdev


class Endpoint:
    """Answers HTTP requests for metrics.

    `bdevs` is called for each request, in its thread.
    """

    def __init__(self, host: str, port: int, bdevs: Callable[[], Iterable[Bdev]]) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise RequestError(
                "metrics need prometheus-client: pip install 'virtio-bdev[metrics]'"
            ) from error
        registry = prometheus_client.CollectorRegistry()
        registry.register(_Collector(bdevs))  # type: ignore[arg-type, unused-ignore]
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry=registry)
        except (OSError, UnicodeError) as error:  # the latter of what no name of a host can be
            code, words = (error.errno or 0, error.strerror) if isinstance(error, OSError) else (0, error)
            raise TransportError(code, f"cannot serve metrics at {host}:{port}: {words}") from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    def __init__(self, bdevs: Callable[[], Iterable[Bdev]]) -> None:
        self._bdevs = bdevs

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["bdev", "operation"]
        requests = CounterMetricFamily("virtio_bdev_requests", "Requests that went well", labels=labels)
        nbytes = CounterMetricFamily("virtio_bdev_bytes", "Bytes of them", labels=labels)
        seconds = CounterMetricFamily("virtio_bdev_seconds", "Time that they took", labels=labels)
        failed = CounterMetricFamily("virtio_bdev_failed", "Requests that failed", labels=["bdev"])
        size = GaugeMetricFamily("virtio_bdev_size_bytes", "Size of the disk", labels=["bdev"])
        for bdev in self._bdevs():
            stats = bdev.stats
            for operation in ("read", "write", "unmap"):
                counts = getattr(stats, operation)
                requests.add_metric([bdev.name, operation], counts.requests)
                nbytes.add_metric([bdev.name, operation], counts.nbytes)
                seconds.add_metric([bdev.name, operation], counts.total_ns / 1e9)
            failed.add_metric([bdev.name], stats.failed)
            size.add_metric([bdev.name], bdev.size)
        yield from (requests, nbytes, seconds, failed, size)
