"""The backbone "smol", made of packages: conversion, training of its projector, benchmarks from images."""
