# Stands in for pybind11's own CMake package where only torch's copy of its headers is installed.
# Knows just what gradloc's CMakeLists.txt asks for: pybind11_add_module with NO_EXTRAS.
#
#   cmake -Dpybind11_DIR=bench/pybind11_from_torch -DGRADLOC_PYBIND11_INCLUDE=<torch>/include ...
if(NOT EXISTS "${GRADLOC_PYBIND11_INCLUDE}/pybind11/pybind11.h")
  set(pybind11_FOUND FALSE)
  set(pybind11_NOT_FOUND_MESSAGE
    "GRADLOC_PYBIND11_INCLUDE=${GRADLOC_PYBIND11_INCLUDE} has no pybind11/pybind11.h")
  return()
endif()
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

function(pybind11_add_module name)
  list(REMOVE_ITEM ARGN NO_EXTRAS)
  Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  # SYSTEM: its warnings are not ours.
  target_include_directories(${name} SYSTEM PRIVATE "${GRADLOC_PYBIND11_INCLUDE}")
endfunction()
