# FindNCCL: NCCL as it lies in a wheel beside LibTorch's, in the CUDA toolkit, or in the system.
#
#   NCCL::nccl     the library with its header
#   NCCL_VERSION   for example 2.28.9

# LibTorch loads its own wheel's library; the header must not be newer than that.
get_filename_component(site_packages "${LibTorch_ROOT}" DIRECTORY)
set(places "${site_packages}/nvidia/nccl" "${CUDAToolkit_LIBRARY_ROOT}" "${CUDAToolkit_TARGET_DIR}")

find_library(NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${places} PATH_SUFFIXES lib lib64)
# The header beside the library: another one could be of another version.
get_filename_component(library_folder "${NCCL_LIBRARY}" DIRECTORY)
find_path(NCCL_INCLUDE_DIR nccl.h HINTS "${library_folder}/../include" "${library_folder}/../../include")
if(NCCL_INCLUDE_DIR)
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${NCCL_INCLUDE_DIR}/nccl.h" line REGEX "^#define NCCL_${part} +[0-9]+")
    string(REGEX MATCH "[0-9]+$" NCCL_${part} "${line}")
  endforeach()
  set(NCCL_VERSION "${NCCL_MAJOR}.${NCCL_MINOR}.${NCCL_PATCH}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NCCL REQUIRED_VARS NCCL_LIBRARY NCCL_INCLUDE_DIR VERSION_VAR NCCL_VERSION)

if(NCCL_FOUND AND NOT TARGET NCCL::nccl)
  add_library(NCCL::nccl UNKNOWN IMPORTED)
  set_target_properties(NCCL::nccl PROPERTIES
    IMPORTED_LOCATION "${NCCL_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${NCCL_INCLUDE_DIR}")
endif()
