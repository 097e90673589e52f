"""Prometheus metrics of the agent, read from its state at each scrape. Every series carries node_id."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llorch_api import DeviceHealth, ReplicaState

from .devices import Devices
from .publisher import Publisher
from .replicas import Replica, Replicas

_MIB: Final = 1 << 20


class AgentMetrics(Collector):
    """Devices, replicas, slots, and how the publishing goes."""

    def __init__(self, node_id: str, devices: Devices, replicas: Replicas, publisher: Publisher) -> None:
        self._node = node_id
        self._devices = devices
        self._replicas = replicas
        self._publisher = publisher

    def collect(self) -> Iterator[Metric]:
        """Called by each scrape."""
        yield from self._device_metrics()
        yield from self._pool_metrics()
        yield from self._publisher_metrics()

    def _device_metrics(self) -> Iterator[Metric]:
        total = self._gauge("llorch_device_memory_total_bytes", "Memory of a device", "device", "name")
        free = self._gauge("llorch_device_memory_free_bytes", "Free memory of a device", "device")
        foreign = self._gauge("llorch_device_memory_foreign_bytes", "Memory in use by what is not llorch's", "device")
        unmanaged = self._gauge("llorch_device_memory_unmanaged_bytes", "Foreign memory that no known pod explains", "device")
        held = self._gauge("llorch_device_held", "1 while another pod holds the device", "device")
        healthy = self._gauge("llorch_device_healthy", "0 while the device is Unhealthy", "device")
        load = self._gauge("llorch_device_utilization_ratio", "Share of time that the device computed", "device")
        temperature = self._gauge("llorch_device_temperature_celsius", "Temperature of a device", "device")
        power = self._gauge("llorch_device_power_watts", "Power drawn by a device", "device")
        for each in self._devices.readings:
            total.add_metric([self._node, each.uuid, each.name], each.total * _MIB)
            free.add_metric([self._node, each.uuid], each.free * _MIB)
            strange = self._devices.shares.foreign.get(each.uuid, 0)
            foreign.add_metric([self._node, each.uuid], strange * _MIB)
            unmanaged.add_metric([self._node, each.uuid], 0 if each.held_by else strange * _MIB)
            held.add_metric([self._node, each.uuid], int(bool(each.held_by)))
            healthy.add_metric([self._node, each.uuid], int(each.health is not DeviceHealth.UNHEALTHY))
            if each.load is not None:
                for gauge, value, unit in zip((load, temperature, power), each.load, (0.01, 1, 0.001), strict=True):
                    if value is not None:
                        gauge.add_metric([self._node, each.uuid], value * unit)
        yield from (total, free, foreign, unmanaged, held, healthy, load, temperature, power)

    def _pool_metrics(self) -> Iterator[Metric]:
        pools: dict[str, list[Replica]] = defaultdict(list)
        for replica in self._replicas:
            pools[replica.pool].append(replica)
        slots = self._gauge("pool_slots_total", "Slots of the pool's ready replicas on this node", "pool_id")
        slots_free = self._gauge("pool_slots_free", "Slots of these that no request has", "pool_id")
        leases = self._gauge("active_leases", "Slot leases that are out", "pool_id")
        ready = self._gauge("pool_ready", "1 while a replica of the pool on this node is ready", "pool_id")
        vram_total = self._gauge("pool_vram_total_bytes", "Memory of the devices that the pool uses on this node", "pool_id")
        vram_free = self._gauge("pool_vram_free_bytes", "Free memory of these", "pool_id")
        states = self._gauge("llorch_replicas", "Replicas on this node by state", "pool_id", "state")
        restarts = CounterMetricFamily(
            "llorch_engine_restarts", "Times an engine was started again", labels=["node_id", "pool_id", "replica_id"]
        )
        for pool, replicas in sorted(pools.items()):
            serving = [replica for replica in replicas if replica.serving]
            used = {uuid for replica in replicas for uuid in replica.devices}
            of_pool = [device for device in self._devices.readings if device.uuid in used]
            labels = [self._node, pool]
            slots.add_metric(labels, sum(replica.slots.total for replica in serving))
            slots_free.add_metric(labels, sum(replica.slots.free for replica in serving))
            leases.add_metric(labels, sum(replica.slots.in_use for replica in replicas))
            ready.add_metric(labels, int(bool(serving)))
            vram_total.add_metric(labels, sum(device.total for device in of_pool) * _MIB)
            vram_free.add_metric(labels, sum(device.free for device in of_pool) * _MIB)
            counted = Counter(replica.state for replica in replicas)
            for state in ReplicaState:
                states.add_metric([*labels, state.value], counted[state])
            for replica in replicas:
                restarts.add_metric([*labels, replica.id], replica.restarts)
        yield from (slots, slots_free, leases, ready, vram_total, vram_free, states, restarts)

    def _publisher_metrics(self) -> Iterator[Metric]:
        attempts = CounterMetricFamily("pool_registration_attempts", "Registrations", labels=["node_id", "outcome"])
        beats = CounterMetricFamily("pool_heartbeat_sent", "Writes of the node's status", labels=["node_id", "kind", "outcome"])
        for (kind, outcome), count in sorted(self._publisher.outcomes.items()):
            if kind == "register":
                attempts.add_metric([self._node, outcome], count)
            else:
                beats.add_metric([self._node, kind, outcome], count)
        yield from (attempts, beats)
        last = self._gauge("llorch_last_heartbeat_timestamp_seconds", "When the node's status was last written")
        last.add_metric([self._node], self._publisher.last_success)
        yield last

    @staticmethod
    def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=["node_id", *labels])
