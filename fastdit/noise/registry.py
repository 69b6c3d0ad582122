"""The registry of noise processes. A new process is one file in this folder and one line here."""

from pkgutil import resolve_name

from fastdit.noise.process import NoiseProcess

# Each line names a module and the process's class in it. The order is that of the flags in --help.
_CLASSES = (
    "fastdit.noise.edm:EDM",
    "fastdit.noise.ddpm:DDPM",
    "fastdit.noise.flow:Flow",
)

PROCESSES: dict[str, type[NoiseProcess]] = {process.name: process for process in map(resolve_name, _CLASSES)}
