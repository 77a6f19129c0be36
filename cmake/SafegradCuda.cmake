# SafegradCuda: libsafegrad_cuda.so, the GPU part of the program, where SAFEGRAD_CUDA asks for it and a
# CUDA toolkit and NCCL are there. No GPU is needed to build it. The program loads it when a run asks for
# a GPU (src/dist/cuda_module.h).

set(SAFEGRAD_CUDA AUTO CACHE STRING "Build the GPU part: AUTO (where nvcc and NCCL are found), ON, OFF")
set_property(CACHE SAFEGRAD_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT SAFEGRAD_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SAFEGRAD_CUDA is '${SAFEGRAD_CUDA}'; allowed: AUTO, ON, OFF")
endif()

set(SAFEGRAD_HAS_CUDA OFF)
if(SAFEGRAD_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
set(missing "")
if(CMAKE_CUDA_COMPILER)
  find_package(CUDAToolkit 13.0 QUIET)
  find_package(NCCL 2.27 QUIET)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  set(missing "nvcc")
elseif(NOT CUDAToolkit_FOUND)
  set(missing "a CUDA toolkit of version 13, which LibTorch ${LibTorch_VERSION} is built with")
elseif(NOT NCCL_FOUND)
  set(missing "NCCL 2.27 or newer (nccl.h, libnccl)")
elseif(NOT TARGET LibTorch::cuda)
  set(missing "LibTorch's libtorch_cuda and libc10_cuda")
endif()
if(missing)
  if(SAFEGRAD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SAFEGRAD_CUDA=ON needs ${missing}")
  endif()
  message(STATUS "GPU part: not built, ${missing} not found")
  return()
endif()
set(SAFEGRAD_HAS_CUDA ON)
message(STATUS "GPU part: CUDA ${CUDAToolkit_VERSION}, NCCL ${NCCL_VERSION}")

# Ampere, Hopper, Blackwell; later ones from the last one's PTX.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
endif()
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
# CMake 3.25 does not know that nvcc has C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA_STANDARD_LATEST 20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

# Kernels: raw pointers and sizes only, so that nvcc reads no tensor header.
add_library(safegrad_cuda_kernels OBJECT ${SAFEGRAD_CUDA_KERNELS})
target_include_directories(safegrad_cuda_kernels PRIVATE src)
set_target_properties(safegrad_cuda_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_compile_options(safegrad_cuda_kernels PRIVATE -Xcompiler=-Wall,-Wextra "SHELL:-Xcompiler=-idirafter,${LibTorch_INCLUDE_DIR}")

# The last four are parts of the program, once more: a shared library's code is compiled in its own way.
add_library(safegrad_cuda SHARED
  src/cuda/attention.cpp src/cuda/cuda_backend.cpp src/cuda/cuda_kernels.cpp src/cuda/cuda_module.cpp
  src/cuda/event_stopwatch.cpp src/cuda/launch_check.cpp src/cuda/nccl_communicator.cpp src/cuda/nccl_link.cpp
  $<TARGET_OBJECTS:safegrad_cuda_kernels>
  src/core/gpu_limits.cpp src/core/parameter.cpp src/dist/communicator.cpp src/dist/control_plane.cpp)
target_link_libraries(safegrad_cuda PRIVATE safegrad_options LibTorch::cuda NCCL::nccl CUDA::cudart)
# LibTorch's operators for GPUs register themselves when their library is loaded; what that library
# needs in turn may be missing on a machine that only builds.
target_link_options(safegrad_cuda PRIVATE
  -Wl,--no-as-needed -Wl,--unresolved-symbols=ignore-in-shared-libs -Wl,-Bsymbolic)
set_target_properties(safegrad_cuda PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}"
  BUILD_RPATH "${LibTorch_ROOT}/lib;${site_packages}/nvidia/cu13/lib;${site_packages}/nvidia/nccl/lib")
