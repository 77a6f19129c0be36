# FindLibTorch: LibTorch as it lies in the PyPI wheel `torch`, as imported targets.
#
# The wheel's own TorchConfig.cmake asks for a CUDA toolkit and links torch_cuda; a CPU build needs neither.
#
#   LibTorch_ROOT     folder `torch` of the wheel; default: asked from .venv, then from python3, or, where
#                     a wheel of our own is built, from the Python that builds it
#   LibTorch::cpu     torch_cpu and c10 with their headers
#   LibTorch::cuda    torch_cuda and c10_cuda as well; only in a wheel that is built with CUDA
#   LibTorch_VERSION  for example 2.11.0

if(NOT LibTorch_ROOT)
  set(pythons "${CMAKE_SOURCE_DIR}/.venv/bin/python" python3)
  if(SKBUILD)
    set(pythons "${Python_EXECUTABLE}")
  endif()
  foreach(python ${pythons})
    # -I: what is installed, also where pip builds in an environment of its own.
    execute_process(
      COMMAND ${python} -I -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE LibTorch_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(LibTorch_ROOT)
      break()
    endif()
  endforeach()
endif()

# A build folder may be configured again, for another Python environment.
if(NOT LibTorch_ROOT STREQUAL LibTorch_LAST_ROOT)
  foreach(found LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_CUDA_LIBRARY LibTorch_C10_CUDA_LIBRARY
      LibTorch_INCLUDE_DIR NCCL_LIBRARY NCCL_INCLUDE_DIR)
    unset(${found} CACHE)
  endforeach()
  set(LibTorch_LAST_ROOT "${LibTorch_ROOT}" CACHE INTERNAL "")
endif()

find_library(LibTorch_CPU_LIBRARY torch_cpu PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_C10_LIBRARY c10 PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_CUDA_LIBRARY torch_cuda PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_C10_CUDA_LIBRARY c10_cuda PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_path(LibTorch_INCLUDE_DIR ATen/ATen.h PATHS "${LibTorch_ROOT}/include" NO_DEFAULT_PATH)
if(EXISTS "${LibTorch_ROOT}/version.py")
  file(STRINGS "${LibTorch_ROOT}/version.py" version_line REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" LibTorch_VERSION "${version_line}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "run launch/setup, or pip install torch==2.11.0, or set LibTorch_ROOT to the folder `torch` of an installed wheel")

if(LibTorch_FOUND AND NOT TARGET LibTorch::cpu)
  add_library(LibTorch::c10 SHARED IMPORTED)
  set_target_properties(LibTorch::c10 PROPERTIES
    IMPORTED_LOCATION "${LibTorch_C10_LIBRARY}"
    # The wheel brings its own copy of fmt: searched last, so that the system's is found.
    INTERFACE_COMPILE_OPTIONS "SHELL:-idirafter ${LibTorch_INCLUDE_DIR}")
  add_library(LibTorch::cpu SHARED IMPORTED)
  set_target_properties(LibTorch::cpu PROPERTIES
    IMPORTED_LOCATION "${LibTorch_CPU_LIBRARY}"
    INTERFACE_LINK_LIBRARIES LibTorch::c10)
  if(LibTorch_CUDA_LIBRARY AND LibTorch_C10_CUDA_LIBRARY)
    add_library(LibTorch::c10_cuda SHARED IMPORTED)
    set_target_properties(LibTorch::c10_cuda PROPERTIES
      IMPORTED_LOCATION "${LibTorch_C10_CUDA_LIBRARY}"
      INTERFACE_LINK_LIBRARIES LibTorch::c10)
    add_library(LibTorch::cuda SHARED IMPORTED)
    set_target_properties(LibTorch::cuda PROPERTIES
      IMPORTED_LOCATION "${LibTorch_CUDA_LIBRARY}"
      INTERFACE_LINK_LIBRARIES "LibTorch::cpu;LibTorch::c10_cuda")
  endif()
endif()
